"""Before the stages: fetch published data that are not bundled."""

from __future__ import annotations

import logging

from omegaconf import DictConfig, OmegaConf

from nlme_sbi.config.conversion import convert
from nlme_sbi.io.download import PUBLISHED, download, find_published

log = logging.getLogger(__name__)


def download_data(cfg: DictConfig) -> None:
    """Fetch the file that ``data`` reads into the cache, where ``fit_population`` finds it.

    Args:
        cfg: composed configuration with ``data`` and ``url`` (another address of the same archive, or null).

    Raises:
        ValueError: where ``data`` is not one that can be downloaded, or what came is not the published file.
        OSError: where the server cannot be reached or the disk refuses.
    """
    path = OmegaConf.select(cfg, "data.path", throw_on_missing=False)
    file = None if path is None else find_published(path)
    if file is None:
        choices = ", ".join(f"data={each.data}" for each in PUBLISHED)
        raise ValueError(f"These data are not downloaded: their file is {path or 'yours'}. To download: {choices}.")
    url = convert(cfg.url, str | None, "url")
    where, fetched = download(file, url=url)
    log.info("%s: %s (%s)", "Downloaded" if fetched else "There already", where, file.source)
