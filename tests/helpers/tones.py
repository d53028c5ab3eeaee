"""A language of tones: each letter is a pitch. Small networks learn it in seconds."""

import json

import flax.linen as nn
import numpy as np

from experiments.data.speech.corpus import SAMPLE_RATE_HZ, Corpus, Utterance
from experiments.models.speech.padding import MaskedBatchNorm

PITCHES_HZ = {"a": 300, "b": 900, "c": 2200, "d": 5000, "e": 7000}
LETTER_S, PAUSE_S = 0.09, 0.03
# The smallest network and schedule that learn it.
SETTINGS = {
    "policies": "float32",
    "num_mels": 16,
    "num_channels": 2,
    "num_units": 8,
    "num_layers": 1,
    "num_buckets": 2,
    "batch_size": 8,
    "num_epochs": 12,
    "learning_rate": 0.03,
}


class FramesNetwork(nn.Module):
    """Hears a pair of frames at a time, and compiles in a second.

    It keeps the contract of `SpeechModel`, and its layer "classes".
    """

    num_classes: int
    num_units: int

    @nn.compact
    def __call__(self, features, num_frames, *, train):
        pairs = features.reshape(features.shape[0], -1, 2, features.shape[2])
        x = nn.Dense(self.num_units, name="units")(pairs.mean(axis=2))
        num_outputs = -(-num_frames // 2)
        x = MaskedBatchNorm(name="norm")(x, num_outputs, train=train)
        return nn.Dense(self.num_classes, name="classes")(nn.relu(x)), num_outputs


def make_frames_network(config, vocabulary):
    return FramesNetwork(vocabulary.size, config.num_units)


class Tones:
    """Utterances of random letters, (N,) float32 at 16 kHz."""

    def __init__(self, num, *, seed, letters="abcd", lengths=(2, 5)):
        self.rng = np.random.default_rng(seed)
        self.texts = [
            "".join(self.rng.choice(list(letters), lengths[index % len(lengths)]))
            for index in range(num)
        ]
        self.audio = [self._speak(text) for text in self.texts]
        self.prefix = f"tones-{seed}"

    def __len__(self):
        return len(self.texts)

    def __getitem__(self, index):
        duration_s = len(self.audio[index]) / SAMPLE_RATE_HZ
        name = f"{self.prefix}-{index}"
        return Utterance(name, self.texts[index], self.prefix, duration_s)

    def samples(self, index):
        return self.audio[index]

    def _speak(self, text):
        pause = np.zeros(round(PAUSE_S * SAMPLE_RATE_HZ))
        time_s = np.arange(round(LETTER_S * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
        tones = [np.sin(2 * np.pi * PITCHES_HZ[letter] * time_s) for letter in text]
        parts = [part for tone in tones for part in (pause, 0.5 * tone)] + [pause]
        samples = np.concatenate(parts)
        noise = self.rng.normal(0, 0.01, len(samples))
        return (samples + noise).astype(np.float32)


def corpus(num=48, num_held_out=12, *, name="tones", **options):
    """Returns utterances of two lengths, so that batches have two shapes."""
    train, val, test = (
        Tones(size, seed=seed, **options)
        for seed, size in enumerate((num, num_held_out, num_held_out))
    )
    return Corpus(name, train, val, test, "letters")


def write_manifest(folder, tones_corpus, *, rate_hz=22_050):
    """Writes the recordings, at another rate and in two formats, and a manifest."""
    import soundfile
    import soxr

    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for split in ("train", "val", "test"):
        utterances = getattr(tones_corpus, split)
        for index in range(len(utterances)):
            ending = ("wav", "flac")[index % 2]
            file = folder / f"{split}-{index}.{ending}"
            samples = soxr.resample(utterances.samples(index), SAMPLE_RATE_HZ, rate_hz)
            soundfile.write(file, samples, rate_hz)
            text = utterances[index].text
            lines.append({"audio": file.name, "text": text, "split": split})
    manifest = folder / "tones.jsonl"
    manifest.write_text("\n".join(map(json.dumps, lines)))
    return manifest
