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


def pixels(value: Any, where: str) -> Image.Image:
    """The picture, in colours.

    Raises:
        ValueError: an array has other values than those from 0 to 255, uint16, or fractions from 0 to 1, or too many channels.
    """
    if isinstance(value, Image.Image) and value.mode[0] not in "IF":
        return value.convert("RGB")
    return Image.fromarray(_of_eight_bits(np.asarray(value), where)).convert("RGB")


def _of_eight_bits(values: NDArray[Any], where: str) -> NDArray[np.uint8]:
    """Values from 0 to 255, [height, width] if there is one channel."""
    if values.ndim == 3 and values.shape[2] == 1:
        values = values[:, :, 0]
    if values.ndim == 3 and values.shape[2] > 4:
        raise ValueError(f"{where} has an image {list(values.shape)}; give [height, width] or [height, width, 1 to 4 channels].")
    kind, low, high = values.dtype.kind, values.min(), values.max()
    top = 1 if kind in "fb" and high <= 1 else 65535 if (kind, values.dtype.itemsize) == ("u", 2) else 255
    if not (low >= 0 and high <= top):
        raise ValueError(
            f"{where} has an image of {values.dtype} from {low:g} to {high:g}. Give values from 0 to 255, uint16 that use "
            "all of their 16 bits, or fractions from 0 to 1."
        )
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


def is_sound(value: Any) -> bool:
    """Samples [length], alone or beside their rate, a file's content or path, or what decodes one."""
    if isinstance(value, Mapping):
        return "array" in value or "bytes" in value or "path" in value
    return len(getattr(value, "shape", ())) == 1 or hasattr(value, "get_all_samples")


def waveform(value: Any, sampling_rate: int, where: str) -> NDArray[np.float32]:
    """One channel [length] at `sampling_rate` samples a second; samples that stand alone are taken to have that rate.

    Raises:
        ValueError: a file is no WAV, which is all that can be read without torchcodec, or broken; an array is of 64-bit integers;
            there are no samples, or some that are not finite.
    """
    if hasattr(value, "get_all_samples"):
        decoded = value.get_all_samples()
        samples, rate = np.asarray(decoded.data, np.float32).T, decoded.sample_rate
    elif not isinstance(value, Mapping):
        samples, rate = _of_array(value, where), sampling_rate
    elif value.get("array") is not None:
        samples, rate = _of_array(value["array"], where), value.get("sampling_rate") or sampling_rate
    else:
        samples, rate = _from_file(value, where)
    if samples.ndim not in (1, 2) or not samples.size or not np.isfinite(samples).all():
        what = (
            f"samples {list(samples.shape)}" if samples.ndim not in (1, 2) or not samples.size else "samples that are not finite"
        )
        raise ValueError(
            f"{where} has a sound of {what}; expected finite ones, [length] or [length, channels]. Leave the row out."
        )
    samples = samples.mean(1) if samples.ndim == 2 else samples
    if rate != sampling_rate:
        from scipy.signal import resample_poly  # a second to import, which only sounds shall cost

        shared = math.gcd(int(rate), sampling_rate)
        samples = resample_poly(samples, sampling_rate // shared, int(rate) // shared)
    return np.asarray(samples, np.float32)


def _of_array(value: Any, where: str) -> NDArray[np.float32]:
    """Samples [length] or [length, channels]: of the latter there are fewer, on whichever side they stand."""
    samples = np.asarray(value)
    if samples.dtype.kind in "iu" and samples.dtype.itemsize == 8:
        raise ValueError(f"{where} has a sound of {samples.dtype}, of no known scale. Give int16, or fractions from -1 to 1.")
    samples = _scaled(samples)
    return samples.T if samples.ndim == 2 and samples.shape[0] < samples.shape[1] else samples


def _scaled(samples: NDArray[Any]) -> NDArray[np.float32]:
    """From -1 to 1: integers as parts of the largest that their type holds; silence is in the middle of those without a sign."""
    if samples.dtype.kind not in "iu":
        return samples.astype(np.float32)
    half = 2.0 ** (8 * samples.dtype.itemsize - 1)
    return np.asarray(samples / half - (samples.dtype.kind == "u"), np.float32)


def _from_file(value: Mapping[str, Any], where: str) -> tuple[NDArray[np.float32], int]:
    if not value.get("bytes") and not value.get("path"):
        raise ValueError(f"{where} holds no sound: it has neither an array nor bytes nor a path. Leave the row out.")
    content = value.get("bytes") or Path(value["path"]).read_bytes()
    if not content.startswith(b"RIFF"):
        raise ValueError(
            f"{where} holds a sound that is no WAV file. Convert it, or decode it yourself (torchcodec or soundfile) and pass "
            "dicts with 'array' and 'sampling_rate'."
        )
    from scipy.io import wavfile

    try:
        rate, samples = wavfile.read(io.BytesIO(content))
    except Exception as error:  # of many kinds, by where the file breaks off
        raise ValueError(f"{where} has a WAV file that cannot be read ({str(error).rstrip('.')}). Leave the row out.") from error
    return _scaled(samples), int(rate)
