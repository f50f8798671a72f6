"""
The masks of secure aggregation, as in Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine
Learning, CCS 2017: a key of 256 bits is expanded by AES in counter mode, the paper's PRG.

Flower's own expansion (`pseudo_rand_gen`) is not used. It folds a key into 32 bits, of which the keys of pairs vary in 28,
and seeds a Mersenne Twister: few enough for a server to try them all.
"""

from __future__ import annotations

import base64

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key


KEY_BYTES = 32


def mask(key: bytes, num_words: int) -> np.ndarray:
    """
    Args:
        key (`bytes`): A key of 32 bytes, which is used for one mask only.
        num_words (`int`): The length of the mask.

    Returns:
        `np.ndarray`: The mask: pseudo-random words, of uint32.

    Raises:
        ValueError: if the key has another length.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"The key of a mask must have {KEY_BYTES} bytes, got {len(key)}.")
    # a key is used once, so that the counter can start at 0
    encryptor = Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()
    return np.frombuffer(encryptor.update(bytes(4 * num_words)), dtype="<u4").astype(np.uint32, copy=False)


def pair_mask(private_key: bytes, public_key: bytes, num_words: int) -> np.ndarray:
    """
    Args:
        private_key (`bytes`): The private key of one of two clients, as PEM.
        public_key (`bytes`): The public key of the other one, as PEM.
        num_words (`int`): The length of the mask.

    Returns:
        `np.ndarray`: The mask that both can make, of uint32. The client with the larger node id adds it, and the other one
        subtracts it.

    Raises:
        ValueError: if one of them is not such a key.
    """
    # the agreed key goes through HKDF, and comes in base64
    key = generate_shared_key(bytes_to_private_key(private_key), bytes_to_public_key(public_key))
    return mask(base64.urlsafe_b64decode(key), num_words)
