"""The old place of `optrelax.certification.journals`: kept so that scripts that read journals go on."""

from optrelax.certification.journals import *  # noqa: F403
