"""Where the privacy of a federation meets its rounds: what it does not go with, the noise of a round, and when to stop."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.utils import logging

from peft_ravan.merging import GaussianMechanism, get_merge_method
from peft_ravan.merging.privacy import check_plain_mean
from peft_ravan.tuner.gradient_bases import awaits_gradient

from .privacy import Privacy, PrivateRounds, import_dp_accounting
from .rounds import Round, derive_seed


if TYPE_CHECKING:
    from .arguments import FederatedArguments
    from .clients import LiveAdapter
    from .federated_trainer import FederatedTrainer
    from .participation import Availability


logger = logging.get_logger(__name__)


def check_privacy_arguments(args: FederatedArguments) -> None:
    """
    Check what can be checked without the clients, and read `privacy` into a dict.

    Args:
        args ([`FederatedArguments`]): The arguments.

    Raises:
        ValueError: if `privacy` has a value that it cannot have, or does not go with other arguments.
        TypeError: if `privacy` is not what it must be.
    """
    if args.privacy is None:
        return
    privacy = Privacy.parse(args.privacy)
    if args.merge_method is not None:
        check_plain_mean(get_merge_method(args.merge_method))
    if args.scaffold:
        raise ValueError(
            "`privacy` does not go with `scaffold`: clients upload control variates then, which are not clipped and get no "
            "noise. Use `proximal_mu` against clients that drift apart."
        )
    if args.update_limits.is_set:
        raise ValueError(
            "`privacy` does not go with `max_update_norm` and `max_examples`: it clips every update to `clip_norm` and gives "
            "all clients the same weight. Leave them out."
        )
    if args.participation_weights == "examples":
        raise ValueError(
            "`privacy` does not go with `participation_weights='examples'`: who takes part would tell how much data clients "
            "have. Give weights by client that may be known, or none."
        )
    if args.min_successful_clients > 1:
        raise ValueError(
            f"`privacy` does not go with min_successful_clients={args.min_successful_clients}: a round that is repeated "
            "with others because clients failed has another result for a reason that their data may be. Leave it at 1; a "
            "client that fails counts as one that has changed nothing."
        )
    if privacy.secret_sampling and (args.participation_weights is not None or args.clients_per_round is None):
        found = "all take part" if args.clients_per_round is None else "`participation_weights` are given"
        raise ValueError(
            f"`secret_sampling` counts on clients that are drawn with equal chances, but {found}. Set `clients_per_round` and "
            "no weights, or leave `secret_sampling` out, so that every client counts as one that takes part in every round."
        )
    # as JSON has it: the arguments are written into checkpoints and logs
    args.privacy = privacy.to_dict()


def resolve_privacy(
    trainer: FederatedTrainer, adapter: LiveAdapter, availability: Availability | None
) -> PrivateRounds | None:
    """
    Check that a federation can be private, and work out its noise.

    Args:
        trainer ([`FederatedTrainer`]): The trainer, of which the arguments, the clients and the model are read.
        adapter ([`LiveAdapter`]): What travels.
        availability (`Callable[[str, int], bool]`, *optional*): Whether a client is available in a round.

    Returns:
        [`PrivateRounds`]: The noise and the accounting of the rounds, or `None` if `privacy` is not set.

    Raises:
        ImportError: if dp-accounting is not installed.
        ValueError: if the federation cannot be private as it is asked to be.
    """
    args, num_clients = trainer.args, len(trainer.clients)
    if args.privacy is None:
        return None
    import_dp_accounting()
    privacy = Privacy.parse(args.privacy)
    if privacy.secret_sampling and availability is not None:
        raise ValueError(
            "`secret_sampling` counts on clients that are drawn from all with equal chances, but `availability` decides who "
            "can be drawn. Leave one of the two out."
        )
    if awaits_gradient(trainer.model, adapter.adapter_name):
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
            seed = [derive_seed(privacy.noise_seed, "noise", this_round.number, part) for part in range(4)]
        return GaussianMechanism(privacy.clip_norm, self.privacy.round.noise_multiplier, len(this_round.clients), seed)

    def _needed_clients(self, this_round: Round) -> int:
        """How many clients must succeed. None with privacy: their noise is what counts, and they may not be replaced."""
        return 0 if self.privacy is not None else min(self.args.min_successful_clients, len(this_round.clients))

    def _privacy_record(self, this_round: Round) -> dict[str, Any]:
        """What the record of a round says of privacy."""
        if self.privacy is None:
            return {}
        if this_round.clients and not this_round.num_examples:
            logger.warning(f"Round {this_round.number}: noise alone was added. {this_round.failed()}")
        return self.privacy.record(self._round_records(), bool(this_round.clients))

    def _round_records(self) -> list[dict[str, Any]]:
        return [record for record in self.state.log_history if record.get("round")]
