"""Datasets on the Hugging Face Hub: resolve a revision to a commit, list its Parquet shards, explain failures."""

from clip_medical.data.parquet import HUB, reason
from clip_medical.errors import UserError


def hub_shards(name: str, revision: str | None) -> tuple[str, list[str]]:
    """Return the commit of `revision` (None: the newest) and the paths of its Parquet shards, sorted, possibly none.

    The shards stay on the Hub and are read from there. Their paths contain the commit.
    Raises UserError if there is no such dataset or revision, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        info = HfApi().dataset_info(name, revision=revision)
    except GatedRepoError as error:  # a subclass of RepositoryNotFoundError
        raise UserError(f"{name} on the Hub is gated. Request access on its page, then run `hf auth login`.") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{name} on the Hub has no revision {revision!r}. Correct --revision, or omit it.") from error
    except RepositoryNotFoundError as error:
        where = f"neither a local file or folder nor a dataset on {constants.ENDPOINT}"
        raise UserError(f"--data {name} is {where}. Check the name. If it is private, run `hf auth login`.") from error
    except Exception as error:  # no network, a proxy, a server failure: whatever httpx raises
        cause = f"no local file or folder, and {constants.ENDPOINT} cannot be reached: {reason(error)}"
        advice = f"run `hf download {name} --repo-type dataset --local-dir FOLDER` elsewhere and use --data FOLDER"
        raise UserError(f"--data {name} is {cause}. Check the network, or {advice}.") from error
    files = sorted(file.rfilename for file in info.siblings or () if file.rfilename.endswith(".parquet"))
    return str(info.sha), [f"{HUB}datasets/{name}@{info.sha}/{file}" for file in files]
