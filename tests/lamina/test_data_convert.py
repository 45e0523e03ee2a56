"""Sounds, log-mel frames, texts, splits: each against its definition."""

import cmath
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image as Pillow

from lamina.data.image import read_image
from lamina.data.sound import LogMel, SoundSettings, read_wav, resample
from lamina.data.split import choose_test
from lamina.data.text import open_tokenizer, words
from lamina.errors import ConfigError
from tests.lamina.trees import write_sound


def slow_log_mel(samples, rate, window, hop, length, frames, coefficients):
    """The formula of lamina/data/sound.py, sum by sum."""
    mel = [i * 2595 * math.log10(1 + rate / 2 / 700) / (coefficients + 1) for i in range(coefficients + 2)]
    corner = [700 * (10 ** (m / 2595) - 1) for m in mel]
    hann = [math.sin(math.pi * n / window) ** 2 for n in range(window)]
    result = np.empty((frames, coefficients))
    for i in range(frames):
        piece = [hann[n] * (samples[i * hop + n] if i * hop + n < len(samples) else 0.0) for n in range(window)]
        power = []
        for b in range(length // 2 + 1):
            total = sum(x * cmath.exp(-2j * math.pi * b * n / length) for n, x in enumerate(piece))
            power.append(abs(total) ** 2 / sum(h * h for h in hann))
        for k in range(coefficients):
            low, mid, high = corner[k : k + 3]
            total = 0.0
            for b, value in enumerate(power):
                f = b * rate / length
                total += value * max(0.0, min((f - low) / (mid - low), (high - f) / (high - mid)))
            result[i, k] = math.log(1e-6 + total)
    return result


@pytest.mark.parametrize("samples", [200, 90])
def test_log_mel_frames_are_the_documented_sums(samples):
    values = np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32)
    mel = LogMel(SoundSettings(rate=2000, window_ms=20, hop_ms=15), frames=6, coefficients=5)
    expected = slow_log_mel(values.tolist(), 2000, 40, 30, mel.length, 6, 5)
    np.testing.assert_allclose(mel(values), expected, atol=2e-5)


def test_every_mel_filter_holds_a_bin():
    mel = LogMel(SoundSettings(), frames=2, coefficients=128)
    assert mel.filters.any(axis=1).all()
    assert mel.length == 1024  # the window alone would take 512
    with pytest.raises(ConfigError, match="too many for a sampling rate of 8000 Hz"):
        LogMel(SoundSettings(rate=8000), frames=1, coefficients=60000)


@pytest.mark.parametrize(("source", "target"), [(22050, 16000), (8000, 16000), (44100, 16000)])
def test_resampling_keeps_a_tone_and_removes_what_the_new_rate_cannot_hold(source, target):
    times = np.arange(source) / source
    kept = resample(np.sin(2 * np.pi * 1000 * times).astype(np.float32), source, target)
    assert len(kept) == target
    expected = np.sin(2 * np.pi * 1000 * np.arange(target) / target)
    assert np.abs(kept - expected)[200:-200].max() < 2e-3
    if source > target * 1.3:
        gone = resample(np.sin(2 * np.pi * 0.48 * source * times).astype(np.float32), source, target)
        assert np.abs(gone[200:-200]).max() < 0.01


def test_a_sound_is_read_no_further_than_needed(tmp_path):
    write_sound(tmp_path / "x.wav", samples=44100, rate=44100)
    whole, there = read_wav(tmp_path / "x.wav", 16000, 16000)
    part, same = read_wav(tmp_path / "x.wav", 16000, 3000)
    assert (len(whole), len(part), there, same) == (16000, 3000, 16000, 16000)
    np.testing.assert_allclose(part, whole[:3000], atol=1e-6)


def test_a_picture_is_turned_as_its_exif_note_says_and_a_large_jpeg_stays_like_itself(tmp_path):
    ramp = np.linspace(0, 255, 640, dtype=np.uint8)[None].repeat(480, 0)
    image = Pillow.fromarray(np.stack([ramp] * 3, -1))
    exif = Pillow.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    image.save(tmp_path / "turned.jpg", exif=exif)
    image.save(tmp_path / "plain.jpg")

    plain = read_image(tmp_path / "plain.jpg", (3, 12, 16), "stretch")
    turned = read_image(tmp_path / "turned.jpg", (3, 16, 12), "stretch")

    exact = np.asarray(image.resize((16, 12), Pillow.Resampling.BILINEAR), np.float32).transpose(2, 0, 1) / 255
    np.testing.assert_allclose(plain, exact, atol=0.02)
    np.testing.assert_allclose(turned, np.rot90(exact, -1, (1, 2)), atol=0.02)


def test_cropping_takes_the_largest_centre_of_the_wanted_proportions(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20] = 255
    Pillow.fromarray(wide).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png", (1, 10, 10), "crop").min() == 1
    assert read_image(tmp_path / "x.png", (1, 10, 10), "stretch").min() == 0


def test_words_are_the_same_for_case_and_composition_and_never_the_padding():
    tokenize = open_tokenizer("words", 1000)
    assert words("Don't STOP, Caf\u00e9!") == ["don", "'", "t", "stop", ",", "caf\u00e9", "!"]
    assert tokenize("Cafe\u0301") == tokenize("CAF\u00c9")
    # The ids are part of the format: crc32("a") is 0xE8B7BE43 by any tool.
    assert tokenize("a A") == [1 + 0xE8B7BE43 % 999] * 2
    with pytest.raises(ConfigError, match="vocabulary of 1 has no room"):
        open_tokenizer("words", 1)


@given(st.text(max_size=30), st.integers(2, 400))
def test_built_in_tokens_are_in_the_vocabulary_and_not_0(text, vocabulary):
    assert all(1 <= token < vocabulary for token in open_tokenizer("words", vocabulary)(text))
    if vocabulary >= 257:
        assert bytes(token - 1 for token in open_tokenizer("bytes", vocabulary)(text)).decode() == text


def write_tokenizer(path, vocabulary):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.enable_padding(length=9)
    tokenizer.save(str(path))
    return str(path)


def test_a_tokenizer_file_gives_its_own_ids_without_its_own_padding(tmp_path):
    file = write_tokenizer(tmp_path / "t.json", {"[PAD]": 0, "[UNK]": 1, "cat": 2, "dog": 3})
    assert open_tokenizer(file, 4)("dog cat cow") == [3, 2, 1]
    with pytest.raises(ConfigError, match="has 4 tokens, the model a vocabulary of 3"):
        open_tokenizer(file, 3)
    other = write_tokenizer(tmp_path / "o.json", {"[UNK]": 0, "[PAD]": 1})
    with pytest.raises(ConfigError, match=r"pads with \{'\[PAD\]': 1\}, the model with id 0"):
        open_tokenizer(other, 9)
    with pytest.raises(ConfigError, match="does not exist"):
        open_tokenizer("none.json", 9)
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(ConfigError, match="is no tokenizer file"):
        open_tokenizer(str(tmp_path / "bad.json"), 9)
    with pytest.raises(ConfigError, match="at least 257, the model has 9"):
        open_tokenizer("bytes", 9)


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), max_size=80), st.floats(0.05, 0.95), st.integers(0, 9))
def test_the_test_share_of_every_label_is_met_but_for_its_last_example_and_depends_on_the_seed_alone(labels, share, seed):
    is_test = choose_test(labels, [None] * len(labels), share, seed)
    for label in set(labels):
        chosen = [bool(test) for test, own in zip(is_test, labels, strict=True) if own == label]
        assert abs(sum(chosen) - min(share * len(chosen), len(chosen) - 1)) <= 0.5 + 1e-9
        assert not all(chosen)
    np.testing.assert_array_equal(is_test, choose_test(labels, [None] * len(labels), share, seed))


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from("abcdefgh")), max_size=80), st.integers(0, 9))
def test_a_group_is_never_on_both_sides(pairs, seed):
    is_test = choose_test([label for label, _ in pairs], [group for _, group in pairs], 0.3, seed)
    sides = {}
    for (_, group), test in zip(pairs, is_test, strict=True):
        assert sides.setdefault(group, bool(test)) == bool(test)
