"""The contestant with a Python dict: a server like `rankd serve`, save that its rows are in a DictCache.

RANKD_...=... python -m rankd.bench.feature_suite.dict_server MODELS
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import cast

from rankd.bench.feature_suite.dict_cache import DictCache
from rankd.config import read_config
from rankd.features.reading.shared_features import FeatureService, MakeCache
from rankd.serve.lifecycle import run_server
from rankd.serve.settings import ServeConfig


def main() -> None:
    """Serve the folder that is named as the variables RANKD_* say."""
    logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(message)s")
    config = read_config(ServeConfig, None, os.environ)
    run_server(Path(sys.argv[1]), config, FeatureService(config.features, make_cache=cast(MakeCache, DictCache)))


if __name__ == "__main__":
    main()
