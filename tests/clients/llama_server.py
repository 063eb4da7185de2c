"""llama.cpp's server as a command, from the build that xllamacpp ships, with the arguments that this project gives it.

It runs in an environment of its own (``scripts/clients.sh``), where the command is ``bin/llama-server``.
"""

from __future__ import annotations

import argparse
import signal

import xllamacpp


def main() -> None:
    """Serve until a signal ends the process."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name in ("-m", "--mmproj", "--host"):
        parser.add_argument(name, required=True)
    for name in ("-c", "--port", "-np", "--image-min-tokens", "--image-max-tokens"):
        parser.add_argument(name, type=int, required=True)
    given = parser.parse_args()
    settings = xllamacpp.CommonParams()
    settings.model.path, settings.mmproj.path = given.m, given.mmproj
    settings.n_ctx, settings.n_parallel = given.c, given.np
    settings.image_min_tokens, settings.image_max_tokens = given.image_min_tokens, given.image_max_tokens
    settings.hostnames, settings.port = [given.host], given.port
    settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(settings)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server


if __name__ == "__main__":
    main()
