"""Who speaks: espeak-ng's variants of a voice, split so that tests hear strangers.

Left out are whispers, robots, voices that are hard to understand, and those whose own
speed is 1.5 times the others'. Of variants that sound nearly alike, either one is left
out or both are in the same split.
"""

MIN_DISTANCE = 0.2
"""Difference in timbre, at least, between a held-out voice and each in training: root
mean square over frequencies, in nepers of the mean log-spectrum of one sentence."""

TEST_VOICES = ("Alicia", "Lee", "Mario", "f4", "linda", "m1", "paul", "rob")
"""Voices that are heard in the test set only."""

VAL_VOICES = ("benjamin", "david", "f1", "f3", "m2", "norbert")
"""Voices that are heard in the validation set only."""

TRAIN_VOICES = (
    *("Alex", "Andy", "Annie", "Denis", "Diogo", "Gene", "Jacky", "Michael", "Mike"),
    *("Nguyen", "Reed", "RicishayMax", "Storm", "aunty", "belinda", "boris", "ed"),
    *("edward", "f2", "f5", "grandma", "grandpa", "gustave", "ian", "iven", "iven2"),
    *("iven3", "iven4", "john", "klatt", "klatt3", "klatt4", "m3", "m4", "m5", "m7"),
    *("m8", "marcelo", "max", "michel", "pablo", "quincy", "sandro"),
    *("shelby", "steph", "steph2", "travis", "victor"),
)
"""Voices that are heard in training."""
