"""AISHELL-1, 178 hours of read Mandarin by 400 speakers, from its own layout.

    data_aishell/transcript/aishell_transcript_v0.8.txt    BAC009S0002W0122 而 对 楼市 …
    data_aishell/wav/{train,dev,test}/S0002/BAC009S0002W0122.wav
    data_aishell/wav/S0002.tar.gz                          holds train/S0002/….wav

The speakers' archives are read as they are where they are not unpacked. A few hundred
recordings have no transcript; they are left out.

Source: H. Bu et al., AISHELL-1: an open-source Mandarin speech corpus and a speech
recognition baseline, O-COCOSDA 2017; https://www.openslr.org/33.
"""

import functools
import os
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from experiments.data import cache
from experiments.data.extra import import_extra
from experiments.data.speech import archives
from experiments.data.speech.config import Unit
from experiments.data.speech.corpus import Corpus
from experiments.data.speech.durations import recorded
from experiments.data.speech.recordings import Recording
from experiments.harness.errors import DataError

UNITS: dict[str, str] = {
    "characters": "characters",
    "pinyin": "pinyin letters",
    "pinyin-tones": "pinyin letters and tones",
}
TRANSCRIPT = Path("transcript", "aishell_transcript_v0.8.txt")
SPLITS = ("train", "dev", "test")


def load_aishell(
    data_dir: str | os.PathLike[str], *, unit: Unit = "characters"
) -> Corpus:
    """Finds the recordings of AISHELL-1 and their texts.

    Args:
      data_dir: `data_aishell`, or the folder that holds it.
      unit: what the texts are made of: hanzi without spaces ("characters"), or pinyin
        syllables between spaces, with ü as v, without tones ("pinyin") or with a tone
        digit after each, 5 for the neutral tone ("pinyin-tones").

    Raises:
      DataError: if the transcript, a split or a library is missing, or an archive is
        damaged.
    """
    if unit not in UNITS:
        raise DataError(f"unit {unit!r} is none of {', '.join(UNITS)}.")
    root = _root(Path(data_dir))
    texts = _read_transcript(root / TRANSCRIPT, _to_text(unit))
    by_split: dict[str, list[Recording]] = {split: [] for split in SPLITS}
    num_found = 0
    for split, recording in _find_recordings(root / "wav"):
        num_found += 1
        if recording.id in texts:
            text = texts[recording.id]
            by_split[split].append(recording._replace(text=text))
    _check(root, by_split, num_found, len(texts))
    train, val, test = (
        recorded(by_split[split], name=f"aishell-{split}") for split in SPLITS
    )
    return Corpus("AISHELL-1", train, val, test, unit=UNITS[unit])


def _root(data_dir: Path) -> Path:
    for root in (data_dir / "data_aishell", data_dir):
        if (root / TRANSCRIPT).is_file():
            return root
    archive = data_dir / "data_aishell.tgz"
    remedy = (
        f"unpack {archive} first: tar xzf data_aishell.tgz"
        if archive.is_file()
        else "point --data-dir to data_aishell or to the folder that holds it"
    )
    raise DataError(
        f"{data_dir} holds no AISHELL-1: expected data_aishell/{TRANSCRIPT.as_posix()} "
        f"in it; {remedy} (https://www.openslr.org/33)."
    )


def _read_transcript(path: Path, to_text: Callable[[list[str]], str]) -> dict[str, str]:
    """Returns the text of each utterance by its id."""
    texts: dict[str, str] = {}
    try:
        with open(path, encoding="utf-8-sig") as lines:
            for line in lines:
                if words := line.split():
                    texts[words[0]] = to_text(words[1:])
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path} cannot be read ({error}); expected UTF-8 lines of an utterance's "
            "name and its words; unpack the corpus again."
        ) from error
    return texts


def _to_text(unit: Unit) -> Callable[[list[str]], str]:
    if unit == "characters":
        return "".join
    pypinyin = import_extra("pypinyin", extra="speech")
    tones = unit == "pinyin-tones"
    style = pypinyin.Style.TONE3 if tones else pypinyin.Style.NORMAL

    @functools.lru_cache(maxsize=200_000)
    def spell(word: str) -> str:
        # Word by word, as the transcript divides them: 银行 is yin hang, 行 xing.
        return " ".join(
            pypinyin.lazy_pinyin(
                unicodedata.normalize("NFKC", word).lower(),
                style=style,
                v_to_u=False,
                neutral_tone_with_five=tones,
            )
        )

    return lambda words: " ".join(map(spell, words))


def _find_recordings(wav: Path) -> Iterator[tuple[str, Recording]]:
    """Yields split and recording, without its text, in the order of their names."""
    unpacked = set()
    for split in SPLITS:
        for speaker in _sorted_names(wav / split):
            unpacked.add(speaker)
            for name in _sorted_names(wav / split / speaker):
                path = os.path.join(wav, split, speaker, name)
                if name.endswith(".wav"):
                    yield split, Recording(name[:-4], "", speaker, path)
    packed = [
        wav / name
        for name in _sorted_names(wav)
        if name.endswith(".tar.gz") and name.removesuffix(".tar.gz") not in unpacked
    ]
    folder = cache.cache_dir() / "speech" / "aishell"
    for archive in tqdm(packed, "unpacking AISHELL-1", disable=None, leave=False):
        yield from _in_archive(archive, archives.decompressed(archive, folder))


def _in_archive(archive: Path, tar: Path) -> Iterator[tuple[str, Recording]]:
    for member in sorted(archives.members(tar)):
        parts = PurePosixPath(member.name).parts
        if len(parts) < 3 or parts[-3] not in SPLITS or not parts[-1].endswith(".wav"):
            continue
        split, speaker, name = parts[-3:]
        label = f"{archive}: {member.name}"
        place = (str(tar), member.offset, member.num_bytes, label)
        yield split, Recording(name[:-4], "", speaker, *place)


def _sorted_names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder)) if folder.is_dir() else []


def _check(
    root: Path, by_split: dict[str, list[Recording]], num_found: int, num_texts: int
) -> None:
    counts = {split: len(recordings) for split, recordings in by_split.items()}
    if missing := [split for split, count in counts.items() if not count]:
        raise DataError(
            f"{root / 'wav'} holds no recordings with a text for {', '.join(missing)}: "
            f"expected wav/{missing[0]}/SPEAKER/*.wav, or the speakers' archives "
            f"wav/*.tar.gz; found {num_found} recordings and {num_texts} texts."
        )
    ids = Counter(item.id for recordings in by_split.values() for item in recordings)
    if twice := [name for name, count in ids.items() if count > 1]:
        raise DataError(
            f"{twice[0]} is there {ids[twice[0]]} times in {root / 'wav'} (and "
            f"{len(twice) - 1} more are): unpack the corpus again into an empty folder."
        )
    num_used = sum(counts.values())
    if num_found > num_used:
        cache.report(
            f"AISHELL-1: {num_found - num_used} of {num_found} recordings have no "
            "text and are left out"
        )
    if num_texts > num_used:
        cache.report(
            f"AISHELL-1: {num_texts - num_used} of {num_texts} texts have no recording"
        )
