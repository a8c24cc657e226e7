"""The old place of `optrelax.networks.checkpoint_files`: kept so that scripts that read files of networks go on."""

from optrelax.networks.checkpoint_files import *  # noqa: F403
