"""Data sets on the Hugging Face Hub: which commit, which shards, and plain words for whatever goes wrong there."""

from clip_medical.data.parquet import HUB, Shard
from clip_medical.errors import UserError


def hub_shards(name: str, revision: str | None, streaming: bool) -> tuple[str, list[Shard]]:
    """The commit that `revision` (default: the newest) is, and its Parquet shards in order of name; may be none.

    streaming: shards stay on the Hub and are read from there; else they are downloaded into the Hugging Face cache.
    Raises UserError if there is no such data set or revision, or the Hub cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = huggingface_hub.HfApi().dataset_info(name, revision=revision)
        commit = info.sha or ""
        paths = sorted(file.rfilename for file in info.siblings or () if file.rfilename.endswith(".parquet"))
        root = f"{HUB}datasets/{name}@{commit}"
        if paths and not streaming:
            root = huggingface_hub.snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns=paths)
    except GatedRepoError as error:
        raise UserError(
            f"{name} on the Hub is open to members alone: ask for access on its page, then `hf auth login`."
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(
            f"{name} on the Hub has no revision {revision!r}: give --revision a commit, tag or branch of it."
        ) from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"--data {name} is no file or folder here and no data set on {huggingface_hub.constants.ENDPOINT}: check "
            "the name; a private one needs `hf auth login`."
        ) from error
    except Exception as error:  # no network, a proxy, a server in trouble: huggingface_hub passes on what httpx raises
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"--data {name} is no file or folder here, and {huggingface_hub.constants.ENDPOINT} cannot be reached "
            f"({reason}): check the network, or run `hf download {name} --repo-type dataset --local-dir FOLDER` where "
            "there is one and give --data FOLDER."
        ) from error
    return commit, [Shard(f"{root}/{path}", f"hub {name} {commit} {path}") for path in paths]
