"""Images and sounds in the forms in which datasets hold them."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def is_image(value: Any) -> bool:
    """A picture, or an array [height, width] or [height, width, channels]; one as large as a picture."""
    if isinstance(value, Image.Image):
        return True
    shape = getattr(value, "shape", ())
    return len(shape) in (2, 3) and min(shape[:2]) > 4


def pixels(value: Any) -> Image.Image:
    """The picture, in colours."""
    picture = value if isinstance(value, Image.Image) else Image.fromarray(np.asarray(value).astype(np.uint8))
    return picture.convert("RGB")


def is_sound(value: Any) -> bool:
    """Samples [length], alone or beside their rate, a file's content or path, or what decodes one."""
    if isinstance(value, Mapping):
        return "array" in value or "bytes" in value or "path" in value
    return len(getattr(value, "shape", ())) == 1 or hasattr(value, "get_all_samples")


def waveform(value: Any, sampling_rate: int, where: str) -> NDArray[np.float32]:
    """One channel [length] at `sampling_rate` samples a second; samples that stand alone are taken to have that rate.

    Raises:
        ValueError: a file is no WAV, which is all that can be read without torchcodec.
    """
    if hasattr(value, "get_all_samples"):
        decoded = value.get_all_samples()
        samples, rate = np.asarray(decoded.data, np.float32).T, decoded.sample_rate
    elif not isinstance(value, Mapping):
        samples, rate = np.asarray(value, np.float32), sampling_rate
    elif value.get("array") is not None:
        samples, rate = np.asarray(value["array"], np.float32), value.get("sampling_rate") or sampling_rate
    else:
        samples, rate = _from_file(value, where)
    samples = samples.mean(1) if samples.ndim == 2 else samples
    if rate != sampling_rate:
        from scipy.signal import resample_poly  # a second to import, which only sounds shall cost

        shared = math.gcd(int(rate), sampling_rate)
        samples = resample_poly(samples, sampling_rate // shared, int(rate) // shared)
    return np.asarray(samples, np.float32)


def _from_file(value: Mapping[str, Any], where: str) -> tuple[NDArray[np.float32], int]:
    content = value.get("bytes") or Path(value["path"]).read_bytes()
    if not content.startswith(b"RIFF"):
        raise ValueError(
            f"{where} holds a sound that is no WAV file. Convert it, or decode it yourself (torchcodec or soundfile) and pass "
            "dicts with 'array' and 'sampling_rate'."
        )
    from scipy.io import wavfile

    rate, samples = wavfile.read(io.BytesIO(content))
    scale = 1.0 if samples.dtype.kind == "f" else float(np.iinfo(samples.dtype).max)
    return samples.astype(np.float32) / scale, int(rate)
