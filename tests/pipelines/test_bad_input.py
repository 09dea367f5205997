"""Every verb with bad input: one clear error, the right exit code, and nothing created or changed.

The command line runs in this process where that is safe; other processes are started only for what needs them: several
ranks and limits of the system. Bad input beside a run that exists is in test_bad_input_on_a_run.py, damage that
training meets after it has begun in test_train.py.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from megamask_pipelines.cli import main as cli
from support.command import TINY, command, environment
from support.refusals import READERS, STDLIB, Refuse, check_refusal, limit_files, prepare, train

SECRET = "hunter2"


CONFIG_READERS = {
    "prepare": ["prepare"],
    "train": ["train"],
    "explain": ["explain", "training.steps"],
}


@pytest.mark.promise("no verb accepts a missing path, a file for a folder, or another folder")
@pytest.mark.parametrize("verb", READERS)
@pytest.mark.parametrize(("given", "why"), [("nope", "folder"), ("text.txt", "folder"), ("folder", "folder")])
def test_verb_refuses_what_is_missing_a_file_or_another_folder(refuse: Refuse, verb: str, given: str, why: str) -> None:
    refuse(*READERS[verb], given, says=(f"error: {given} is n", why))


@pytest.mark.promise("no verb accepts a missing path, a file for a folder, or another folder")
@pytest.mark.parametrize("verb", CONFIG_READERS)
@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("nope.yaml", ("cannot read the config nope.yaml: No such file",)),
        ("folder", ("cannot read the config folder: Is a directory",)),
        ("text.txt", ("text.txt:1: a config is a mapping of sections",)),
        ("latin.txt", ("latin.txt is not UTF-8 text",)),
        ("broken.yaml", ("broken.yaml:2: not valid YAML",)),
        ("lost.yaml", ("nope.yaml (named in lost.yaml:2)",)),
        ("empty.txt", ("empty.txt does not set", "hint: set")),
    ],
)
def test_verb_refuses_a_config_that_is_none(refuse: Refuse, verb: str, given: str, words: tuple[str, ...]) -> None:
    refuse(*CONFIG_READERS[verb], given, says=words)


@pytest.mark.parametrize(
    "arguments",
    # explain alone lists every key, new-config alone writes here, doctor alone looks at this machine
    [
        ["trian", "x"],
        ["verify", "moon", "x"],
        ["verify", "corpus"],
        *([v] for v in cli.VERBS if v not in ("explain", "new-config", "doctor")),
    ],
)
def test_command_line_without_what_it_needs_is_refused(refuse: Refuse, arguments: list[str]) -> None:
    error = refuse(*arguments, says=("hint: ",))
    assert "overrides" not in error  # which may always be left out


def test_no_verb_is_a_usage_error(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "verbs:" in capsys.readouterr().err
    refused = cli.main(["--json"])
    written = capsys.readouterr()
    check_refusal(refused, written.out, written.err, 2, ("unknown verb '--json'; allowed: prepare, data, train",))


@pytest.mark.promise("an unknown key is refused with its line and the nearest key")
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["train", TINY, "training.stepps=3"], ("training.stepps (on the command line)", "mean training.steps?")),
        (["train", "bad_train.yaml"], ("training.stepps (bad_train.yaml:4)", "mean training.steps?")),
        (["train", TINY, "corpus.inputs=[a]"], ("corpus.inputs", "belongs to a config of `megamask prepare`")),
        (["train", STDLIB], ("corpus", "python_stdlib.yaml:", "belongs to a config of `megamask prepare`")),
        (["train", "alone.yaml"], ("alone.yaml does not set run.name", "hint: set run.name")),
        (["train", TINY, "training.steps"], ("'training.steps' is not an override", "key.path=value")),
        (["train", TINY, "--steps=3"], ("unrecognized arguments: --steps=3", "megamask train --help")),
        (prepare("corpus.sequence_lenght=64"), ("corpus.sequence_lenght", "mean corpus.sequence_length?")),
        (["prepare", "bad_prepare.yaml"], ("(bad_prepare.yaml:3)", "mean corpus.sequence_length?")),
        (["prepare", TINY], ("belongs to a config of `megamask train`",)),
        (["explain", "training.steps", TINY, "training.stepps=3"], ("mean training.steps?",)),
        (["explain", "training.steps", "bad_train.yaml"], ("training.stepps (bad_train.yaml:4)",)),
    ],
)
def test_unknown_key_is_refused_with_its_place_and_the_nearest(
    refuse: Refuse, arguments: list[str], words: tuple[str, ...]
) -> None:
    refuse(*arguments, says=words)


def test_explaining_an_unknown_key_names_the_nearest(refuse: Refuse) -> None:
    refuse("explain", "training.stepps", says=("unknown key training.stepps", "mean training.steps?"), assures=False)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("training.steps=two", ("training.steps is 'two' (a string)", "an integer >= 1", "command line")),
        ("training.steps=2.5", ("training.steps is 2.5", "an integer >= 1")),
        ("training.steps=0", ("training.steps is 0", "an integer >= 1")),
        ("optimizer.learning_rate=-1", ("optimizer.learning_rate is -1.0", "a number > 0")),
        ("optimizer.learning_rate=.nan", ("optimizer.learning_rate", "finite")),
        ("objective.complementary=yes", ("objective.complementary is 'yes'", "true or false")),
        ("objective.noise_schedule=quadratic", ("'quadratic'", "linear, cosine_md4, cosine_bd3")),
        ("run.seed=-1", ("run.seed is -1", ">= 0")),
        ("run.name=a/b", ("run.name is 'a/b'", "letters, digits")),
        ("run.name=..", ("run.name is '..'", "not '.' or '..'")),
        ("precision.compute=fp8", ("precision.compute is 'fp8'", "allowed: fp32, bf16")),
        ("training.stop_after_step=3", ("training.stop_after_step is 3", "allowed: 1 to 2")),
        ("model.num_query_groups=3", ("model.num_query_groups is 3", "num_attention_heads is 4", "1, 2, 4")),
        ("data.corpora.more=x", ("data.corpora", "2 entries", "data.mixture has no stage")),
        ("data.corpora.main=null", ("does not set data.corpora",)),
        ("run.output_dir=s3://bucket/runs", ("run.output_dir is 's3://bucket/runs'", "no appends", "COMMIT.json last")),
        ("data.cache_dir=gs://bucket/cache", ("data.cache_dir is", "an object store, which has no renames")),
        ("training.head_chunk_rows=0", ("training.head_chunk_rows is 0", ">= 1")),
    ],
)
def test_value_that_a_run_cannot_have_is_refused(
    refuse: Refuse, small_corpus: Path, override: str, words: tuple[str, ...]
) -> None:
    refuse(*train(small_corpus, override), says=words)


@pytest.mark.parametrize("arguments", [["train"], ["explain", "training.steps"]])
def test_wrong_type_in_a_file_is_refused_with_its_line(refuse: Refuse, arguments: list[str]) -> None:
    refuse(*arguments, "bad_type.yaml", says=("training.steps is 'many'", "an integer >= 1 (bad_type.yaml:3)"))


@pytest.mark.promise("an impossible layout or length is refused, with the possible values")
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["layout.tensor_parallel_size=3"], ("layout.tensor_parallel_size is 3", "num_attention_heads is 4", "1, 2")),
        (["layout.tensor_parallel_size=0"], ("layout.tensor_parallel_size is 0", ">= 1")),
        (["layout.pipeline_parallel_size=3"], ("layout.pipeline_parallel_size is 3", "model.num_layers is 2", "1, 2")),
        (["layout.data_parallel_size=3"], ("layout.data_parallel_size is 3", "global_batch_size is 8", "1, 2, 4, 8")),
        (["training.micro_batch_size=3"], ("training.micro_batch_size is 3", "1, 2, 4, 8")),
        (["training.global_batch_size=7"], ("training.micro_batch_size is 2", "global_batch_size = 7", "1, 7")),
        (["layout.sequence_parallel=true"], ("layout.sequence_parallel is true", "tensor_parallel_size is 1")),
        (["training.sequence_length=63"], ("training.sequence_length is 63", "a multiple of 16", "48 or 64")),
        (["training.sequence_length=128"], ("training.sequence_length is 128", "have 64", "sequence_length=64")),
    ],
)
def test_layout_or_shape_that_cannot_be_is_refused(
    refuse: Refuse, small_corpus: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    refuse(*train(small_corpus, *overrides), says=words)


@pytest.mark.promise("a prompt that does not fit is refused before a run directory is created")
def test_prompt_that_does_not_fit_is_refused_before_a_run_is_made(refuse: Refuse, small_corpus: Path) -> None:
    prompt = "preview.prompts=['', '0123456789']"
    refuse(
        *train(small_corpus, "preview.every_steps=5", "preview.num_tokens=60", prompt),
        says=("preview.prompts: '0123456789' has 10 tokens", "preview.num_tokens = 60", "at most 4 tokens"),
    )


def test_shape_law_meets_the_tensor_parallel_size(refuse: Refuse, small_corpus: Path) -> None:
    shape = ["model.num_attention_heads=16", "model.num_query_groups=16", "model.hidden_size=128"]
    refuse(
        *train(small_corpus, "layout.tensor_parallel_size=16", "training.sequence_length=48", *shape),
        says=("layout.tensor_parallel_size is 16", "training.sequence_length is 48", "lcm(16, 2 * 16)"),
    )


@pytest.mark.promise("a credential is refused and never shown")
@pytest.mark.parametrize(
    ("override", "words"),
    [
        (f"tracking.mlflow.uri=https://me:{SECRET}@host/x", ("tracking.mlflow.uri carries a credential", "env:NAME")),
        (f"tracking.mlflow.uri=https://host/x?token={SECRET}", ("tracking.mlflow.uri carries a credential",)),
        (f"tracking.mlflow.urii=https://me:{SECRET}@host", ("mean tracking.mlflow.uri?",)),
        (f"run.name=https://me:{SECRET}@host", ("run.name carries a credential",)),
        (f"https://me:{SECRET}@host", ("not an override",)),
    ],
)
def test_credential_is_refused_and_not_echoed(
    refuse: Refuse, small_corpus: Path, override: str, words: tuple[str, ...]
) -> None:
    assert SECRET not in refuse(*train(small_corpus, override), says=words)


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("env:MEGAMASK_TEST_UNSET", ("MEGAMASK_TEST_UNSET is not set", "export MEGAMASK_TEST_UNSET=")),
        ("env:NO-NAME", ("env:NAME", "letters, digits")),
    ],
)
def test_tracking_server_that_no_variable_names_is_refused_before_training(
    refuse: Refuse, small_corpus: Path, reference: str, words: tuple[str, ...]
) -> None:
    overrides = ("tracking.mlflow.enabled=true", f"tracking.mlflow.uri={reference}")
    refuse(*train(small_corpus, *overrides), says=("tracking.mlflow.uri", *words))


@pytest.mark.parametrize(
    ("corpus", "words"),
    [
        ("nope", ("data.corpora.main is nope, which is not a folder", "megamask prepare")),
        ("text.txt", ("data.corpora.main is text.txt, which is not a folder",)),
        ("folder", ("data.corpora.main is folder", "no manifest.json")),
    ],
)
def test_training_on_what_is_no_corpus_is_refused(refuse: Refuse, corpus: str, words: tuple[str, ...]) -> None:
    refuse(*train(corpus), says=words)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.output_dir=text.txt"], ("text.txt", "not a folder", "run.output_dir")),
        (["run.output_dir=text.txt/deep"], ("text.txt", "not a folder", "run.output_dir")),
        (["run.output_dir=.", "run.name=text.txt"], ("text.txt", "not a folder", "run.name")),
        (["run.output_dir=.", "run.name=folder"], ("folder", "thesis.tex", "no run.json", "run.name")),
        ([f"run.output_dir={'x' * 300}"], ("File name too long",)),
    ],
)
def test_run_directory_that_cannot_be_is_refused(
    refuse: Refuse, small_corpus: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    refuse(*train(small_corpus, *overrides), says=words)


@pytest.mark.multiprocess
def test_run_that_cannot_write_its_first_file_ends_with_74(refuse_outside: Refuse, small_corpus: Path) -> None:
    says = ("run.json", "file-size limit", "Nothing was published")
    refuse_outside(*train(small_corpus), code=74, says=says, file_bytes=0)


@pytest.mark.promise("a refusal by several ranks is one error")
@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.output_dir=text.txt"], ("text.txt", "not a folder", "run.output_dir")),
        (["training.sequence_length=128"], ("training.sequence_length is 128", "have 64")),
    ],
)
def test_refusal_of_several_ranks_is_one_error(
    refuse_outside: Refuse, small_corpus: Path, overrides: list[str], words: tuple[str, ...]
) -> None:
    stderr = refuse_outside(*train(small_corpus, "layout.data_parallel_size=2", *overrides), code=2, says=words)
    assert len(stderr.splitlines()) == 2  # the error and its hint


@pytest.mark.promise("a full storage ends with 74 and exposes nothing half-written")
@pytest.mark.multiprocess
def test_checkpoint_that_does_not_fit_ends_with_74_and_is_not_visible(place: Path, small_corpus: Path) -> None:
    done = subprocess.run(
        command(*train(small_corpus), "--json"),
        capture_output=True,
        text=True,
        timeout=240,
        env=environment(),
        check=False,
        preexec_fn=lambda: limit_files(60_000),
    )
    assert done.returncode == 74, done.stderr
    assert sum(line.startswith("error:") for line in done.stderr.splitlines()) == 1, done.stderr
    assert "Traceback" not in done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["exit_code"] == 74
    assert "file-size limit" in answer["error"]
    assert not list(place.glob("runs/new/checkpoints/*/COMMIT.json"))
    assert json.loads((place / "runs" / "new" / "status.json").read_text())["exit_code"] == 74


@pytest.mark.multiprocess
def test_answer_that_cannot_be_written_ends_with_74(place: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command("explain", "run.seed"), stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False
        )
    assert done.returncode == 74, done.stderr
    assert done.stderr.startswith("error: megamask explain: the disk is full")
    assert "Traceback" not in done.stderr
