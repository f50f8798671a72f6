"""Where the privacy of a federation meets its rounds: what it does not go with, the noise of a round, and when to stop."""

from __future__ import annotations

from typing import Any

from transformers.utils import logging

from peft_ravan.merging import GaussianMechanism

from .arguments import FederatedArguments
from .clients import LiveAdapter
from .participation import Availability
from .privacy import Privacy, PrivateRounds, import_dp_accounting
from .rounds import Round
from .seeds import derive_seed


logger = logging.get_logger(__name__)


def resolve_privacy(
    args: FederatedArguments, num_clients: int, adapter: LiveAdapter, availability: Availability | None
) -> PrivateRounds | None:
    """
    Check that a federation can be private, and work out its noise.

    Args:
        args ([`FederatedArguments`]): The arguments.
        num_clients (`int`): The number of all clients.
        adapter ([`LiveAdapter`]): What travels.
        availability (`Callable[[str, int], bool]`, *optional*): Whether a client is available in a round.

    Returns:
        [`PrivateRounds`]: The noise and the accounting of the rounds, or `None` if `privacy` is not set.

    Raises:
        ImportError: if dp-accounting is not installed.
        ValueError: if the federation cannot be private as it is asked to be.
    """
    if args.privacy is None:
        return None
    import_dp_accounting()
    privacy = Privacy.parse(args.privacy)
    if privacy.secret_sampling and availability is not None:
        raise ValueError(
            "`secret_sampling` counts on clients that are drawn from all with equal chances, but `availability` decides who "
            "can be drawn. Leave one of the two out."
        )
    if adapter.awaits_gradient:
        raise ValueError(
            "`privacy` does not go with bases that are made from the clients' gradients in a round 0, which has neither "
            "clipping nor noise. Make them from public data before (`initialize_bases_from_gradient`), or use other bases."
        )
    if adapter.statistics:
        raise ValueError(
            f"`privacy` does not go with running statistics that clients upload, such as {adapter.statistics[0]!r}: noise "
            "could make a variance negative. Use a normalisation without them, such as LayerNorm or GroupNorm."
        )
    return PrivateRounds(privacy, num_clients, args.clients_per_round or num_clients, args.num_rounds)


class PrivacyMixin:
    """Lets a federation have client-level differential privacy."""

    privacy: PrivateRounds | None = None

    def _stop_if_spent(self) -> None:
        """Let the run end, if one more round would cost more than is allowed."""
        if self.privacy is None or self.control.should_training_stop:
            return
        next_epsilon, target = self.privacy.next_epsilon(self._round_records()), self.privacy.target_epsilon
        if next_epsilon > target:
            logger.warning(
                f"The run ends after round {self.state.global_step}: one more would take ε from "
                f"{self.privacy.epsilon(self._round_records()):.4g} to {next_epsilon:.4g}, above target_epsilon={target:g}."
            )
            self.control.should_training_stop = True

    def _mechanism(self, this_round: Round) -> GaussianMechanism | None:
        """The clipping and the noise of a round."""
        if self.privacy is None:
            return None
        privacy, seed = self.privacy.privacy, None
        if privacy.noise_seed is not None:
            # 128 bits, of which derive_seed gives 32 at a time
            seed = [derive_seed(privacy.noise_seed, "noise", this_round.round_number, part) for part in range(4)]
        return GaussianMechanism(privacy.clip_norm, self.privacy.round.noise_multiplier, len(this_round.clients), seed)

    def _needed_clients(self, this_round: Round) -> int:
        """How many clients must succeed. None with privacy: their noise is what counts, and they may not be replaced."""
        return 0 if self.privacy is not None else min(self.args.min_successful_clients, len(this_round.clients))

    def _privacy_record(self, this_round: Round) -> dict[str, Any]:
        """What the record of a round says of privacy."""
        if self.privacy is None:
            return {}
        if this_round.clients and not this_round.num_examples:
            logger.warning(f"Round {this_round.round_number}: noise alone was added. {this_round.failed()}")
        return self.privacy.record(self._round_records(), bool(this_round.clients))

    def _round_records(self) -> list[dict[str, Any]]:
        return [record for record in self.state.log_history if record.get("round")]
