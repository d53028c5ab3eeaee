"""The process that holds espeak-ng: says what it reads on stdin, then ends.

It imports nothing but the standard library, is run as a file, and talks through pipes
only: espeak-ng is GPL-3, and no other part of the project loads it.

In: JSON {"library": path, "data": path of espeak-ng-data, "seed": number,
"lines": [[variant of the Mandarin voice, text, rate in words per minute, pitch from 0
to 99], ...]}.
Out: a line of JSON {"sample_rate_hz": number, "num_samples": [of each line]}, then the
samples of all lines, one after the other, int16 in this machine's byte order.
"""

import ctypes
import json
import os
import sys
from pathlib import Path

# Names and values of espeak-ng's speak_lib.h.
AUDIO_OUTPUT_SYNCHRONOUS = 2
INITIALIZE_DONT_EXIT = 0x8000
EE_OK = 0
CHARS_UTF8 = 1
RATE, PITCH = 1, 3

SynthCallback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p
)


class Espeak:
    """espeak-ng, loaded and initialised; it keeps state between the lines it says."""

    def __init__(self, library: str, data: str, seed: int):
        self._variants = Path(data, "voices", "!v")
        self._variant = ""
        # A relative path, because espeak-ng cuts paths of more than 160 characters.
        os.chdir(Path(data).parent)
        self._library = ctypes.CDLL(library)
        self.sample_rate_hz = self._library.espeak_Initialize(
            AUDIO_OUTPUT_SYNCHRONOUS, 0, b".", INITIALIZE_DONT_EXIT
        )
        if self.sample_rate_hz <= 0:
            raise RuntimeError(f"espeak-ng does not start with the data in {data}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(seed))
        self._library.espeak_SetParameter.argtypes = [ctypes.c_int] * 3
        self._parts: list[bytes] = []
        self._callback = SynthCallback(self._receive)
        self._library.espeak_SetSynthCallback(self._callback)

    def say(self, variant: str, text: str, rate: int, pitch: int) -> bytes:
        """Returns int16 samples."""
        self._parts.clear()
        self._set_variant(variant)
        self._check(self._library.espeak_SetParameter(RATE, rate, 0), rate)
        self._check(self._library.espeak_SetParameter(PITCH, pitch, 0), pitch)
        line = text.encode()
        size = ctypes.c_size_t(len(line) + 1)
        status = self._library.espeak_Synth(line, size, 0, 1, 0, CHARS_UTF8, None, None)
        self._check(status, text)
        return b"".join(self._parts)

    def _set_variant(self, variant: str) -> None:
        if variant == self._variant:  # it takes as long as half a line
            return
        if not self._variants.joinpath(variant).is_file():  # espeak-ng takes any name
            raise RuntimeError(f"espeak-ng has no voice {variant!r}")
        voice = f"cmn+{variant}"
        self._check(self._library.espeak_SetVoiceByName(voice.encode()), voice)
        self._variant = variant

    def _receive(self, samples: int | None, num_samples: int, _events: int) -> int:
        if samples and num_samples > 0:
            self._parts.append(ctypes.string_at(samples, 2 * num_samples))
        return 0  # go on

    def _check(self, status: int, what: object) -> None:
        if status != EE_OK:
            raise RuntimeError(f"espeak-ng refuses {what!r} (status {status})")


def main() -> None:
    """Reads the request, says every line in order, writes the answer."""
    request = json.load(sys.stdin)
    espeak = Espeak(request["library"], request["data"], request["seed"])
    audio = [espeak.say(*line) for line in request["lines"]]
    header = {
        "sample_rate_hz": espeak.sample_rate_hz,
        "num_samples": [len(samples) // 2 for samples in audio],
    }
    sys.stdout.buffer.write(json.dumps(header).encode() + b"\n")
    sys.stdout.buffer.writelines(audio)


if __name__ == "__main__":
    main()
