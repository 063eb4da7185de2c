"""Finding a checkpoint, writing one whole or not at all, and what is said of a damaged one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from qwenvl.train.checkpoint import manifest
from qwenvl.train.checkpoint.folder import (
    DRAFTS,
    find_checkpoint,
    problem_of,
    published,
    read_step,
    refused_state_named,
    require_writable,
    write_records,
)
from qwenvl.utils.errors import UserError

OPTIMIZERS = {"plain": "optimizer.pt", "deepspeed": "global_step7", "fsdp": "optimizer_0"}


def checkpoint(folder: Path, step: int, *files: str, name: str | None = None) -> Path:
    """Write a whole checkpoint with these further files."""
    path = folder / (name or f"checkpoint-{step}")
    path.mkdir(parents=True)
    (path / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for file in files:
        (path / file).write_text("state")
    manifest.write(path)
    return path


class TestFind:
    def test_the_highest_whole_one_is_found(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        assert find_checkpoint(str(tmp_path), None) is None
        for step in (2, 9, 10):
            checkpoint(tmp_path, step, "optimizer.pt")
        checkpoint(tmp_path, 99, "optimizer.pt", name="checkpoint-99-copy")
        checkpoint(tmp_path, 99, "optimizer.pt", name="old-checkpoint-99")
        (tmp_path / "checkpoint-11").write_text("no folder")
        found = find_checkpoint(str(tmp_path), None)
        assert found == str(tmp_path / "checkpoint-10") and read_step(found) == 10
        assert not caplog.records
        (tmp_path / "checkpoint-10" / "optimizer.pt").unlink()
        assert find_checkpoint(str(tmp_path), None) == str(tmp_path / "checkpoint-9")
        assert "checkpoint-10 is not complete: optimizer.pt is missing. It is ignored." in caplog.text

    @pytest.mark.parametrize("wanted", ["true", "True", "yes", "1"])
    def test_true_asks_for_one(self, wanted: str, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=f"--resume_from_checkpoint {wanted}: .* holds no complete checkpoint"):
            find_checkpoint(str(tmp_path), wanted)
        newest = checkpoint(tmp_path, 3, "optimizer.pt")
        assert find_checkpoint(str(tmp_path), wanted) == str(newest)

    @pytest.mark.parametrize("wanted", ["false", "False", "no", "0"])
    def test_false_asks_for_none_and_earlier_ones_are_said(
        self, wanted: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        (tmp_path / "checkpoint-new").mkdir()
        assert find_checkpoint(str(tmp_path), wanted) is None
        assert not caplog.records
        checkpoint(tmp_path, 3, "optimizer.pt")
        assert find_checkpoint(str(tmp_path), wanted) is None
        assert "holds checkpoints of an earlier run" in caplog.text

    def test_one_that_is_named_has_to_be_whole(self, tmp_path: Path) -> None:
        whole = checkpoint(tmp_path / "elsewhere", 3, "optimizer.pt", name="mine")
        checkpoint(tmp_path, 9, "optimizer.pt")
        assert find_checkpoint(str(tmp_path), str(whole)) == str(whole)
        (whole / "optimizer.pt").write_text("cut")
        with pytest.raises(UserError, match=r"no complete checkpoint there: optimizer\.pt has 3 bytes, and 5 were"):
            find_checkpoint(str(tmp_path), str(whole))
        with pytest.raises(UserError, match=r"no complete checkpoint there: there is no trainer_state\.json\."):
            find_checkpoint(str(tmp_path), str(tmp_path / "nothing"))

    @pytest.mark.parametrize("engine", OPTIMIZERS)
    @pytest.mark.parametrize("saved", [*OPTIMIZERS, None])
    def test_one_without_the_engines_optimizer_is_refused(self, saved: str | None, engine: str, tmp_path: Path) -> None:
        path = checkpoint(tmp_path, 3, *([OPTIMIZERS[saved]] if saved else []))
        if saved == engine:
            assert find_checkpoint(str(tmp_path), None, engine) == str(path)  # type: ignore[arg-type]
            return
        reason = {
            "plain": f"was saved without DeepSpeed and FSDP: leave --{engine} out",
            "deepspeed": "was saved with DeepSpeed, and this run has none: resume with --deepspeed",
            "fsdp": "was saved with FSDP, and this run has none: resume with --fsdp True",
            None: r"was saved without its optimizer \(--save_only_model\)",
        }[saved]
        for wanted in (None, str(path)):
            with pytest.raises(UserError, match=f"{path} holds no state of the optimizer .*{reason}"):
                find_checkpoint(str(tmp_path), wanted, engine)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("state", "problem"),
    [
        (None, "there is no trainer_state.json"),
        ("{}", "trainer_state.json does not say its step"),
        ("{", "trainer_state.json cannot be read (Expecting"),
        ('{"global_step": 3}', "optimizer.pt is missing"),
    ],
)
def test_the_state_is_read_before_the_manifest_is_held_against_the_files(
    state: str | None, problem: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, 3, "optimizer.pt")
    (path / "optimizer.pt").unlink()
    if state is None:
        (path / "trainer_state.json").unlink()
    else:
        (path / "trainer_state.json").write_text(state)
        manifest.write(path)
        files = json.loads((path / manifest.NAME).read_text())
        files["files"]["optimizer.pt"] = {"bytes": 5, "blake2b": ""}
        (path / manifest.NAME).write_text(json.dumps(files))
    found = problem_of(path)
    assert found is not None and found.startswith(problem)


def publish(place: Path, name: str | None, *files: str, error: Exception | None = None) -> None:
    """Save files, or fail after them."""
    with published(str(place), name, writes=True) as draft:
        draft.mkdir()
        for file in files:
            (draft / file).write_text("new")
        if error is not None:
            raise error


class TestPublished:
    def test_a_checkpoint_appears_whole_and_with_its_manifest(self, tmp_path: Path) -> None:
        (tmp_path / DRAFTS / "checkpoint-2").mkdir(parents=True)  # of a run that was killed
        broken = checkpoint(tmp_path, 3, "left over")
        with published(str(tmp_path), "checkpoint-3", writes=True) as draft:
            assert not (tmp_path / DRAFTS / "checkpoint-2").exists()
            draft.mkdir()
            (draft / "weights").write_text("new")
            (draft / "weights").chmod(0o600)  # as safetensors writes
            assert (broken / "left over").exists(), "the place holds what it held until all of it is there"
        assert {file.name for file in broken.iterdir()} == {"weights", manifest.NAME}
        assert manifest.problem_of(broken) is None
        assert not (tmp_path / DRAFTS).exists()
        assert (broken / "weights").stat().st_mode == (tmp_path / "checkpoint-3" / manifest.NAME).stat().st_mode

    def test_files_of_the_run_replace_those_of_their_names(self, tmp_path: Path) -> None:
        for name in ("model.safetensors", "config.json", "model-00001-of-00002.safetensors", "README.md"):
            (tmp_path / name).write_text("old")
        publish(tmp_path, None, "model.safetensors", "config.json")
        found = {file.name: file.read_text() for file in tmp_path.iterdir()}
        assert found == {"model.safetensors": "new", "config.json": "new", "README.md": "old"}

    def test_weights_are_moved_before_what_names_them(self, tmp_path: Path) -> None:
        """A folder in the place of a file stops the moving, which goes by name after the weights."""
        (tmp_path / "b.json" / "inside").mkdir(parents=True)
        with pytest.raises(UserError, match=r"could not be saved"):
            publish(tmp_path, None, "a.json", "b.json", "c.json", "z.safetensors")
        assert {file.name for file in tmp_path.iterdir() if file.is_file()} == {"z.safetensors", "a.json"}

    def test_who_does_not_write_leaves_everything(self, tmp_path: Path) -> None:
        (tmp_path / DRAFTS / "checkpoint-3").mkdir(parents=True)
        with published(str(tmp_path), "checkpoint-3", writes=False) as draft:
            assert draft == tmp_path / DRAFTS / "checkpoint-3"
        assert draft.is_dir() and not (tmp_path / "checkpoint-3").exists()

    @pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("unexpected pos 64")])
    def test_a_full_disk_leaves_what_was_there(self, error: Exception, tmp_path: Path) -> None:
        earlier = checkpoint(tmp_path, 3, "weights")
        with pytest.raises(UserError, match=rf"checkpoint-3 could not be saved: .*{error.args[-1]}.*save_total_limit"):
            publish(tmp_path, "checkpoint-3", "weights", error=error)
        assert manifest.problem_of(earlier) is None and (earlier / "weights").exists()
        assert not (tmp_path / DRAFTS).exists()

    def test_other_errors_are_the_programs_own(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), published(str(tmp_path), "checkpoint-3", writes=True):
            raise KeyError


class TestRefusedState:
    def test_a_file_that_torch_refuses_is_named(self, tmp_path: Path) -> None:
        torch.save({"step": torch.tensor(3)}, tmp_path / "a.pt")
        torch.save({"path": Path("code")}, tmp_path / "b.pt")
        with (
            pytest.raises(UserError, match=r"b\.pt is damaged, or holds more than the state of a run: Weights only"),
            refused_state_named(str(tmp_path)),
        ):
            torch.load(tmp_path / "b.pt", weights_only=True)

    def test_a_cut_file_is_named(self, tmp_path: Path) -> None:
        torch.save({"step": torch.arange(1000)}, tmp_path / "scheduler.pt")
        (tmp_path / "scheduler.pt").write_bytes((tmp_path / "scheduler.pt").read_bytes()[:300])
        with pytest.raises(UserError, match=r"scheduler\.pt is damaged"), refused_state_named(str(tmp_path)):
            torch.load(tmp_path / "scheduler.pt", weights_only=True)

    @pytest.mark.parametrize("folder", [True, False])
    def test_an_error_that_is_not_of_a_file_stays_what_it_is(self, folder: bool, tmp_path: Path) -> None:
        torch.save({"step": torch.tensor(3)}, tmp_path / "a.pt")
        with (
            pytest.raises(RuntimeError, match="^something else$") as caught,
            refused_state_named(str(tmp_path) if folder else None),
        ):
            raise RuntimeError("something else")
        assert not isinstance(caught.value, UserError)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_forbids_writing_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        require_writable(str(tmp_path / "out"))


def test_the_output_folder_is_made_and_tried(tmp_path: Path) -> None:
    require_writable(str(tmp_path / "new" / "out"))
    assert not list((tmp_path / "new" / "out").iterdir())
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output_dir .*file/out cannot be written to: Not a directory\. Choose"):
        require_writable(str(tmp_path / "file" / "out"))


def test_records_say_how_the_folder_was_made(tmp_path: Path) -> None:
    write_records(
        str(tmp_path), "learning_rate: 1\n", {"size": {"longest_edge": 5}}, {"history": "exact"}, [{"rows": 3}]
    )
    assert json.loads((tmp_path / "data.json").read_text()) == [{"rows": 3}]
    assert (tmp_path / "training_args.yaml").read_text() == "learning_rate: 1\n"
    assert json.loads((tmp_path / "original_processor_limits.json").read_text()) == {"size": {"longest_edge": 5}}
    assert json.loads((tmp_path / "versions.json").read_text())["torch"] in torch.__version__
