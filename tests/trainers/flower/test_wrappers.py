"""Flower's own wrappers for differential privacy would prove nothing here, and are refused."""

import pytest


pytest.importorskip("flwr")

from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
)

from peft_ravan.trainers.flower import server_app
from peft_ravan.trainers.flower.strategy import FederatedStrategy

from .helpers import NUM_CLIENTS, Federation, small


FIXED, ADAPTIVE = (1.0, 1.0, NUM_CLIENTS), (0.01, NUM_CLIENTS)
WRAPPERS = {
    DifferentialPrivacyServerSideFixedClipping: FIXED,
    DifferentialPrivacyServerSideAdaptiveClipping: ADAPTIVE,
    DifferentialPrivacyClientSideFixedClipping: FIXED,
    DifferentialPrivacyClientSideAdaptiveClipping: ADAPTIVE,
}


@pytest.mark.parametrize("wrapper", WRAPPERS, ids=lambda wrapper: wrapper.__name__)
def test_a_wrapped_strategy_is_refused(tmp_path, monkeypatch, wrapper):
    def wrapped(*args, **kwargs):
        return wrapper(FederatedStrategy(*args, **kwargs), *WRAPPERS[wrapper])

    monkeypatch.setattr(server_app, "FederatedStrategy", wrapped)
    federation = Federation(small(tmp_path))
    with pytest.raises(ValueError, match="Leave the wrapper out, and use `privacy`"):
        federation.run()
    assert not (tmp_path / "adapter_model.safetensors").exists()
