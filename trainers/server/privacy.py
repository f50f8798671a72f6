"""
Client-level differential privacy over the rounds: the settings of a run, and the accounting of its rounds.

Two data sets are neighbours if one client's data are replaced by any other data (or by none): the number of clients is
not secret. The mean of m clipped changes then moves by at most `2 * clip_norm / m`, so the noise is
`noise_multiplier / 2` times the sensitivity. The accounting uses Google's dp-accounting.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from types import ModuleType
from typing import Any, NamedTuple

from peft_ravan.merging import GaussianMechanism
from peft_ravan.merging.privacy import check_clipping

from ..parsing import parse_settings
from ..seeds import derive_seed


@dataclass(frozen=True)
class Privacy:
    """
    How a federation protects the privacy of its clients: the update of each client is clipped as a whole, and Gaussian
    noise is added to the mean, which has uniform weights.

    Args:
        clip_norm (`float`):
            The largest L2 norm of a client's change in a round, over all tensors of its update together.
        noise_multiplier (`float`, *optional*):
            The standard deviation of the noise on the sum of the clients' changes, divided by `clip_norm`. By default the
            smallest value with which all `num_rounds` rounds stay within `target_epsilon`.
        target_epsilon (`float`, *optional*):
            The run ends before a round that would raise ε above this value. By default there is no limit.
        delta (`float`, *optional*, defaults to 1e-5):
            δ of the guarantee. Must be below 1 / the number of clients.
        secret_sampling (`bool`, *optional*, defaults to `False`):
            Whether it stays secret which clients take part in which round. This makes ε smaller, but it holds only if
            no adversary sees the records or can guess `federated_seed`. By default every client is assumed to take
            part in every round.
        noise_seed (`int`, *optional*):
            A seed of the noise, to make a run reproducible. Anyone who knows it can remove the noise, so it must stay
            secret: it is left out wherever the arguments are written. By default the noise comes from the operating system.

    Raises:
        TypeError: if `noise_seed` is not an integer.
        ValueError: if a number is out of range, or neither `noise_multiplier` nor `target_epsilon` is given.
    """

    clip_norm: float
    noise_multiplier: float | None = None
    target_epsilon: float | None = None
    delta: float = 1e-5
    secret_sampling: bool = False
    noise_seed: int | None = field(default=None, repr=False)

    def __post_init__(self):
        check_clipping(self.clip_norm, self.noise_multiplier or 0.0)
        if self.noise_multiplier is None and self.target_epsilon is None:
            raise ValueError(
                "`privacy` needs a `noise_multiplier`, or a `target_epsilon` from which it is worked out, and has neither."
            )
        if self.target_epsilon is not None and not (self.target_epsilon > 0 and math.isfinite(self.target_epsilon)):
            raise ValueError(f"`target_epsilon` must be a finite number above 0, got {self.target_epsilon!r}.")
        if not 0 < self.delta < 1:
            raise ValueError(f"`delta` must be above 0 and below 1, got {self.delta!r}.")
        if self.noise_seed is not None and (isinstance(self.noise_seed, bool) or not isinstance(self.noise_seed, int)):
            raise TypeError(f"`noise_seed` must be an integer, got {self.noise_seed!r}.")

    @classmethod
    def parse(cls, value: Privacy | Mapping[str, Any] | str) -> Privacy:
        """
        Args:
            value (`Privacy`, `dict[str, Any]` or `str`): The value of `privacy`. A string is parsed as JSON.

        Returns:
            [`Privacy`]: The validated settings.

        Raises:
            TypeError: if it is none of these, or has a field that [`Privacy`] does not have.
        """
        return parse_settings(cls, value, "privacy")

    def to_dict(self) -> dict[str, Any]:
        """
        Returns:
            `dict[str, Any]`: The fields, in a form that JSON can hold.
        """
        return asdict(self)


class NoisyRound(NamedTuple):
    """
    What the accounting has to know about a round.

    Args:
        noise_multiplier (`float`): The standard deviation of the noise on the sum, divided by the clipping norm.
        sampling_rate (`float`): The share of all clients that was drawn in secret, or 1 if anybody may have taken part.
    """

    noise_multiplier: float
    sampling_rate: float = 1.0


def import_dp_accounting() -> ModuleType:
    """
    Returns:
        `ModuleType`: The package `dp_accounting`.

    Raises:
        ImportError: if it is not installed.
    """
    try:
        import dp_accounting
        import dp_accounting.rdp
    except ImportError as error:
        raise ImportError(
            "`privacy` needs the package dp-accounting, which is not installed: `pip install 'peft-ravan[privacy]'`."
        ) from error
    return dp_accounting


def epsilon_of(rounds: Mapping[NoisyRound, int], num_clients: int, delta: float) -> float:
    """
    Compute the ε of several rounds together. Their order does not matter.

    Without secret sampling the result is exact: rounds with Gaussian noise compose to a single round with less noise
    (Dong et al., Gaussian Differential Privacy, 2022), whose ε is given by Balle and Wang, 2018. With secret sampling,
    each round samples a fixed number of clients without replacement and is accounted for by Rényi differential privacy
    (Wang et al., 2019, theorem 27); the result is the smaller of the two values.

    Args:
        rounds (`Mapping[NoisyRound, int]`): The rounds, and how often each kind occurred.
        num_clients (`int`): The number of all clients.
        delta (`float`): δ.

    Returns:
        `float`: ε. Infinite if a round had no noise.
    """
    return _epsilon(tuple(sorted(rounds.items())), num_clients, delta)


@lru_cache(maxsize=256)
def _epsilon(rounds: tuple[tuple[NoisyRound, int], ...], num_clients: int, delta: float) -> float:
    if not rounds:
        return 0.0
    if any(noisy.noise_multiplier == 0 for noisy, _ in rounds):
        return math.inf
    dp = import_dp_accounting()
    noise = sum(count / _noise_by_sensitivity(noisy) ** 2 for noisy, count in rounds) ** -0.5
    epsilon = float(dp.get_epsilon_gaussian(noise, delta))
    if any(noisy.sampling_rate < 1 for noisy, _ in rounds):
        accountant = _rdp_accountant()
        for noisy, count in rounds:
            accountant.compose(_rdp_event(noisy, num_clients), count)
        epsilon = min(epsilon, float(accountant.get_epsilon(delta)))
    return epsilon


def _noise_by_sensitivity(noisy: NoisyRound) -> float:
    # replacing a client moves a sum by twice the clipping norm
    return noisy.noise_multiplier / 2


def _rdp_accountant() -> Any:
    dp = import_dp_accounting()
    return dp.rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.REPLACE_ONE)


def _rdp_event(noisy: NoisyRound, num_clients: int) -> Any:
    # for this relation, dp-accounting's PLD accountant doubles the sensitivity, but its RDP accountant does not
    dp = import_dp_accounting()
    event = dp.GaussianDpEvent(_noise_by_sensitivity(noisy))
    if noisy.sampling_rate == 1:
        return event
    return dp.SampledWithoutReplacementDpEvent(num_clients, round(noisy.sampling_rate * num_clients), event)


def calibrated_noise_multiplier(privacy: Privacy, num_rounds: int, num_clients: int, sampling_rate: float) -> float:
    """
    Args:
        privacy ([`Privacy`]): What is asked for.
        num_rounds (`int`): The number of rounds.
        num_clients (`int`): The number of all clients.
        sampling_rate (`float`): The share of them that is drawn in secret, or 1 without secret sampling.

    Returns:
        `float`: A noise multiplier with which the rounds stay within `target_epsilon`: the smallest one, or slightly
        more with secret sampling.
    """
    dp = import_dp_accounting()
    # rounded up, because ε is computed by a search that may end slightly above the target
    noise = dp.get_sigma_gaussian(privacy.target_epsilon, privacy.delta) * (1 + 1e-9)
    noise_multiplier = 2 * math.sqrt(num_rounds) * float(noise)
    if sampling_rate == 1:
        return noise_multiplier
    sampled = dp.calibrate_dp_mechanism(
        _rdp_accountant,
        lambda noise: dp.SelfComposedDpEvent(_rdp_event(NoisyRound(noise, sampling_rate), num_clients), num_rounds),
        privacy.target_epsilon,
        privacy.delta,
        # with less noise the accountant returns no finite number, and so little is never enough
        dp.LowerEndpointAndGuess(noise_multiplier / 1000, noise_multiplier),
        tol=noise_multiplier * 1e-4,
    )
    return min(noise_multiplier, float(sampled))


class PrivateRounds:
    """
    The privacy of one federation: the noise of its rounds, and the ε that they have spent.

    Args:
        privacy ([`Privacy`]): What is asked for.
        num_clients (`int`): The number of all clients.
        clients_per_round (`int`): The number of clients that are sampled for a round.
        num_rounds (`int`): The number of rounds, used to calibrate the noise if it is not given.

    Raises:
        ValueError: if `delta` is too large for the number of clients, or if even one round would exceed
            `target_epsilon`.
    """

    def __init__(self, privacy: Privacy, num_clients: int, clients_per_round: int, num_rounds: int):
        if privacy.delta >= 1 / num_clients:
            raise ValueError(
                f"`delta` of `privacy` must be below 1 / the number of clients, which is 1 / {num_clients}, got "
                f"{privacy.delta!r}: else a mechanism that gives away one client at random would count as private."
            )
        self.privacy, self.num_clients = privacy, num_clients
        sampling_rate = clients_per_round / num_clients if privacy.secret_sampling else 1.0
        noise_multiplier = privacy.noise_multiplier
        if noise_multiplier is None:
            noise_multiplier = calibrated_noise_multiplier(privacy, num_rounds, num_clients, sampling_rate)
        self.round = NoisyRound(noise_multiplier, sampling_rate)
        if self.next_epsilon_of({}) > self.target_epsilon:
            raise ValueError(
                f"One round would cost ε = {self.next_epsilon_of({}):.3g}, more than `target_epsilon` of "
                f"{privacy.target_epsilon:g}. Give a larger `noise_multiplier`, or none to have it worked out."
            )

    @property
    def target_epsilon(self) -> float:
        """The ε that must not be exceeded; infinite if there is no limit."""
        return math.inf if self.privacy.target_epsilon is None else self.privacy.target_epsilon

    def epsilon(self, history: Iterable[Mapping[str, Any]]) -> float:
        """
        Args:
            history (`Iterable[Mapping[str, Any]]`): The records of rounds, as in `trainer.state.log_history`.

        Returns:
            `float`: The ε that they have spent. Infinite if clients took part in a round without noise.
        """
        return self.epsilon_of(_noisy_rounds(history))

    def next_epsilon(self, history: Iterable[Mapping[str, Any]]) -> float:
        """
        Args:
            history (`Iterable[Mapping[str, Any]]`): The records of rounds.

        Returns:
            `float`: The ε of these rounds and one more.
        """
        return self.next_epsilon_of(_noisy_rounds(history))

    def epsilon_of(self, spent: Mapping[NoisyRound, int]) -> float:
        """
        Args:
            spent (`Mapping[NoisyRound, int]`): The rounds, and how often each kind occurred.

        Returns:
            `float`: The ε that they have spent.
        """
        return epsilon_of(spent, self.num_clients, self.privacy.delta)

    def next_epsilon_of(self, spent: Mapping[NoisyRound, int]) -> float:
        """
        Args:
            spent (`Mapping[NoisyRound, int]`): The rounds, and how often each kind occurred.

        Returns:
            `float`: The ε of these rounds and one more.
        """
        return self.epsilon_of(Counter(spent) + Counter([self.round]))

    def record(self, spent: Mapping[NoisyRound, int], asked: bool) -> dict[str, float]:
        """
        Args:
            spent (`Mapping[NoisyRound, int]`): The rounds before this one.
            asked (`bool`): Whether clients were asked in the round, rather than the round being skipped.

        Returns:
            `dict[str, float]`: The entries for the record of the round: its noise, if it had any, and the ε after it.
        """
        if not asked:
            return {"epsilon": self.epsilon_of(spent)}
        return {**self.round._asdict(), "epsilon": self.next_epsilon_of(spent)}

    def mechanism(self, round_number: int, num_clients: int) -> GaussianMechanism:
        """
        Args:
            round_number (`int`): A round.
            num_clients (`int`): How many clients are asked in it.

        Returns:
            [`~peft_ravan.merging.GaussianMechanism`]: The clipping and the noise of the round.
        """
        privacy, seed = self.privacy, None
        if privacy.noise_seed is not None:
            # 128 bits; derive_seed gives 32 at a time
            seed = [derive_seed(privacy.noise_seed, "noise", round_number, part) for part in range(4)]
        return GaussianMechanism(privacy.clip_norm, self.round.noise_multiplier, num_clients, seed)


def _noisy_rounds(history: Iterable[Mapping[str, Any]]) -> Counter[NoisyRound]:
    # no client was asked in a skipped round
    asked = [record for record in history if record.get("clients") or record.get("failed_clients")]
    return Counter(
        NoisyRound(record.get("noise_multiplier", 0.0), record.get("sampling_rate", 1.0)) for record in asked
    )
