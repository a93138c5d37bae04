import sys

import numpy as np
import pytest
import soundfile

from wherry import audio
from wherry.errors import BadInput, Missing

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("seconds", [0.3, 5.0, 31.0])
def test_log_mel_is_transformers(seconds):
    from transformers import WhisperFeatureExtractor

    wave = (0.3 * RNG.standard_normal(int(16000 * seconds))).astype(np.float32)
    theirs = WhisperFeatureExtractor()(wave, sampling_rate=16000, return_tensors="np")["input_features"]
    ours, mask = audio.prepare([wave], {"features": "log-mel", "frames": 3000})
    assert ours.shape == (1, 80, 3000)
    assert np.abs(ours - theirs).max() < 2e-5
    assert mask.sum() == min(3000, -(-len(wave) // 160))


def test_log_mel_of_other_settings_is_transformers():
    from transformers.audio_utils import mel_filter_bank

    theirs = mel_filter_bank(257, 128, 0.0, 4000.0, 8000, norm="slaney", mel_scale="slaney")
    assert audio.mel_filters(128, 512, 8000) == pytest.approx(theirs.T, abs=1e-12)


def test_a_sine_stays_at_its_place_when_resampled():
    wave = np.sin(2 * np.pi * 440 * np.arange(8000) / 8000).astype(np.float32)
    made = audio.resample(wave, 8000, 16000)
    assert len(made) == 16000
    expected = np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)
    assert np.abs(made - expected)[200:-200].max() < 0.01
    assert np.argmax(np.abs(np.fft.rfft(audio.resample(wave, 8000, 11025)))) == 440


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg"])
def test_files_decode_at_the_wanted_rate(tmp_path, kind):
    wave = 0.5 * np.sin(2 * np.pi * 300 * np.arange(22050) / 22050)
    soundfile.write(tmp_path / f"a.{kind}", np.stack([wave, wave], 1), 22050)
    made = audio.load(tmp_path / f"a.{kind}", 16000)
    assert made.dtype == np.float32
    assert len(made) == pytest.approx(16000, abs=2)
    assert np.abs(made[2000:-2000]).max() == pytest.approx(0.5, abs=0.03)
    audio.check((tmp_path / f"a.{kind}").read_bytes())


def test_arrays_whole_numbers_and_channels():
    assert audio.load(np.full(100, 16384, np.int16), 8000) == pytest.approx(0.5)
    assert audio.load(np.stack([np.ones(50), np.zeros(50)], 1), 8000) == pytest.approx(0.5)
    assert audio.load(np.stack([np.ones(50), np.zeros(50)], 0), 8000) == pytest.approx(0.5)
    assert len(audio.load((np.ones(100), 8000), 16000)) == 200


def test_waves_are_padded_cut_and_normalized():
    waves = [np.ones(10, np.float32), np.ones(4, np.float32)]
    batch, mask = audio.prepare(waves, {"sampling_rate": 8000})
    assert batch.sum(1).tolist() == mask.sum(1).tolist() == [10, 4]
    batch, mask = audio.prepare(waves, {"sampling_rate": 8000, "frames": 6, "layout": "NCT"})
    assert batch.shape == (2, 1, 6)
    noise = (3 + 5 * RNG.standard_normal(1000)).astype(np.float32)
    batch, _ = audio.prepare([noise], {"normalize": True})
    assert batch.mean() == pytest.approx(0, abs=1e-4)
    assert batch.std() == pytest.approx(1, abs=1e-4)


def test_chunks_hold_the_end_of_the_one_before():
    wave = np.arange(1, 11, dtype=np.float32)
    batch, mask = audio.prepare([wave], {"features": "chunks", "window": 4, "context": 2})
    assert batch[0].tolist() == [[0, 0, 1, 2, 3, 4], [3, 4, 5, 6, 7, 8], [7, 8, 9, 10, 0, 0]]
    assert mask.tolist() == [[1, 1, 1]]
    with pytest.raises(BadInput, match="need `window`"):
        audio.prepare([wave], {"features": "chunks"})


def test_what_is_no_sound_is_refused(tmp_path):
    (tmp_path / "a.wav").write_bytes(b"RIFF no sound")
    soundfile.write(tmp_path / "b.wav", np.zeros(0), 8000)
    soundfile.write(tmp_path / "c.wav", np.array([0, np.nan]), 8000, subtype="FLOAT")
    for wrong in (tmp_path / "a.wav", tmp_path / "b.wav", tmp_path / "c.wav", tmp_path / "none.wav",
                  np.zeros((2, 2, 2)), np.array(["a"]), (np.ones(3), 0), b""):  # fmt: skip
        with pytest.raises(BadInput):
            audio.load(wrong, 16000)
    for wrong in ("a.wav", "b.wav", "c.wav"):
        with pytest.raises(BadInput):
            audio.check(tmp_path / wrong)
    with pytest.raises(BadInput, match="too few"):
        audio.log_mel(np.ones(100, np.float32))
    with pytest.raises(BadInput, match="'mfcc' are not known"):
        audio.prepare([np.ones(1000)], {"features": "mfcc"})


def test_features_need_neither_torch_nor_scipy(monkeypatch):
    for name in ("torch", "scipy", "scipy.signal", "soundfile"):
        monkeypatch.setitem(sys.modules, name, None)
    assert audio.prepare([np.ones(16000)], {"features": "log-mel"})[0].shape == (1, 80, 100)
    with pytest.raises(Missing, match=r"wherry\[(audio|eval)\]"):
        audio.prepare([(np.ones(8000), 8000)], {})
    with pytest.raises(Missing, match=r"wherry\[audio\]"):
        audio.load(b"x", 8000)
