"""A preset file as a calibration writes it."""

from support.preset_fixtures import *  # noqa: F403
