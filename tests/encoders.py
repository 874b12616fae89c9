"""The encoders that tests run with. The fast one is optional: without clip_medical/fast its tests are left out."""

from importlib.util import find_spec

ENCODERS = ["reference", "fast"] if find_spec("clip_medical.fast") else ["reference"]
