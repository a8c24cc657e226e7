"""The old place of `optrelax.certification.verdicts`: kept so that scripts that read verdicts go on."""

from optrelax.certification.verdicts import *  # noqa: F403
