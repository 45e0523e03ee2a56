"""The verifier against RFC 8032's own vectors, against the `cryptography` library, and against forgeries."""

from hashlib import sha512

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st

from lamina.bundles.ed25519 import L, P, is_public_key, is_valid

# RFC 8032, section 7.1: TEST 1, TEST 2, TEST 3 and TEST SHA(abc): public key, message, signature.
VECTORS = [
    (
        "d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a",
        b"",
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe246551"
        "41438e7a100b",
    ),
    (
        "3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c",
        b"\x72",
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d"
        "291612bb0c00",
    ),
    (
        "fc51cd8e6218a1a38da47ed00230f0580816ed13ba3303ac5deb911548908025",
        b"\xaf\x82",
        "6291d657deec24024827e69c3abe01a30ce548a284743a445e3680d7db5ac3ac18ff9b538d16f290ae67f760984dc6594a7c15e9716ed28dc027"
        "beceea1ec40a",
    ),
    (
        "ec172b93ad5e563bf4932c70e1245034c35467ef2efd4d64ebf819683467e2bf",
        sha512(b"abc").digest(),
        "dc2a4459e7369633a52b1bf277839a00201009a3efbf3ecb69bea2186c26b58909351fc9ac90b3ecfdfbc7c66431e0303dca179c138ac17ad9be"
        "f1177331a704",
    ),
]
KEY, MESSAGE, SIGNATURE = bytes.fromhex(VECTORS[1][0]), VECTORS[1][1], bytes.fromhex(VECTORS[1][2])
# Points of small order: the neutral one, the one of order 2, those of order 4 (y = 0) and one of order 8.
SMALL = ["01" + "00" * 31, "ec" + "ff" * 30 + "7f", "00" * 32, "00" * 31 + "80"]
SMALL.append("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05")


@pytest.mark.parametrize(("key", "message", "signature"), VECTORS)
def test_the_vectors_of_the_standard_are_valid(key: str, message: bytes, signature: str) -> None:
    assert is_public_key(bytes.fromhex(key))
    assert is_valid(bytes.fromhex(key), message, bytes.fromhex(signature))
    assert not is_valid(bytes.fromhex(key), message + b"\0", bytes.fromhex(signature))


@settings(max_examples=30, deadline=None)
@given(seed=st.binary(min_size=32, max_size=32), message=st.binary(max_size=200))
def test_what_the_library_signs_is_valid(seed: bytes, message: bytes) -> None:
    private = Ed25519PrivateKey.from_private_bytes(seed)
    assert is_valid(private.public_key().public_bytes_raw(), message, private.sign(message))


def says_the_library(key: bytes, message: bytes, signature: bytes) -> bool:
    try:
        Ed25519PublicKey.from_public_bytes(key).verify(signature, message)
    except InvalidSignature:
        return False
    return True


@settings(max_examples=60, deadline=None)
@given(where=st.integers(0, 127 * 8 + 7), data=st.data())
def test_one_flipped_bit_anywhere_is_judged_as_the_library_judges_it(where: int, data: st.DataObject) -> None:
    """Key, signature and a message of 32 bytes as one text of 128 bytes."""
    private = Ed25519PrivateKey.from_private_bytes(data.draw(st.binary(min_size=32, max_size=32)))
    message = data.draw(st.binary(min_size=32, max_size=32))
    text = bytearray(private.public_key().public_bytes_raw() + private.sign(message) + message)
    text[where // 8] ^= 1 << where % 8
    key, signature, message = bytes(text[:32]), bytes(text[32:96]), bytes(text[96:])
    assert is_valid(key, message, signature) is says_the_library(key, message, signature) is False


@settings(max_examples=60, deadline=None)
@given(key=st.binary(max_size=40), message=st.binary(max_size=8), signature=st.binary(max_size=70))
def test_any_bytes_are_judged_without_an_exception(key: bytes, message: bytes, signature: bytes) -> None:
    assert not is_valid(key, message, signature)
    assert isinstance(is_public_key(key), bool)
    assert not is_valid(KEY, message, signature)


def test_a_signature_cannot_be_turned_into_another_valid_one() -> None:
    """S + L satisfies the same equation; it is above the bound."""
    s = int.from_bytes(SIGNATURE[32:], "little")
    for times in (1, 2, 7):
        other = SIGNATURE[:32] + (s + times * L).to_bytes(32, "little")
        assert not is_valid(KEY, MESSAGE, other)


@pytest.mark.parametrize("key", SMALL)
def test_a_key_of_small_order_is_none(key: str) -> None:
    """Under the neutral point, S = 0 and R = neutral would be a signature of every message."""
    neutral = bytes.fromhex(SMALL[0]) + bytes(32)
    assert not is_public_key(bytes.fromhex(key))
    assert not is_valid(bytes.fromhex(key), b"any", neutral)


def test_points_that_are_not_written_in_their_only_form_are_refused() -> None:
    above = (P + 3).to_bytes(32, "little")  # y = 3 once more
    minus_zero = (1 | 1 << 255).to_bytes(32, "little")  # x = 0 with a sign
    assert not is_public_key(above) and not is_public_key(minus_zero)
    not_on_the_curve = next(y.to_bytes(32, "little") for y in range(2, 50) if not is_public_key(y.to_bytes(32, "little")))
    assert not is_valid(not_on_the_curve, MESSAGE, SIGNATURE)


@pytest.mark.parametrize("length", [0, 31, 32, 63, 65, 128])
def test_another_length_is_no_signature(length: int) -> None:
    assert not is_valid(KEY, MESSAGE, (SIGNATURE * 2)[:length])
    assert not is_valid(KEY[:-1], MESSAGE, SIGNATURE)
