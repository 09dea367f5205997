"""A planted token: real commands that meet it in every way, and then no file and no line of output holds it."""

from __future__ import annotations

import base64
import json
import logging
import os
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from megamask.config.load import load_train_config
from megamask.errors import UsageError
from megamask.launch.rank_folder import leave_report
from megamask.provenance import redaction
from megamask.provenance.redaction import (
    forget_secrets,
    redact,
    redact_values,
    redacted,
    register_references,
    register_secret,
)
from megamask.runs.configs import store_attempt_config
from megamask_pipelines.cli import main as cli
from support.command import environment, tiny
from support.config_files import write_configs

TOKEN = "Pl4nted/t0ken+9f"  # needs escaping in a URI, so that its other spellings are met too
WORD = "plain-looking-word"  # of no known shape: nothing but its registration shows that it is secret
URI = f"http://robot:{quote(TOKEN, safe='')}@127.0.0.1:9/api"
SPELLINGS = (TOKEN, quote(TOKEN), quote(TOKEN, safe=""), base64.b64encode(f"robot:{TOKEN}".encode()).decode(), WORD)


@pytest.fixture(autouse=True)
def forgetful() -> Iterator[None]:
    yield
    forget_secrets()


def assert_nowhere(*texts: str) -> None:
    for text in texts:
        for spelling in SPELLINGS:
            assert spelling not in text


# One command that crashes with the token in its hands, while it cannot reach the server that the token is for.
CRASH = """
import logging, os, sys, threading, time, warnings
from pathlib import Path
import megamask.training.hooks as hooks
from megamask_pipelines.cli.main import main

folder = Path(sys.argv[-1])
uri, word, token = os.environ["PLACE_OF_MLFLOW"], os.environ["SERVICE_PASSWORD"], os.environ["PLANTED"]
journal = hooks.StepJournal.after_step

def after_step(self, progress, record):
    journal(self, progress, record)
    if progress.step == 2:
        deadline = time.monotonic() + 150  # the tracker needs seconds to come, and to find nobody
        while time.monotonic() < deadline and not any(
            "mlflow_outage" in path.read_text() for path in folder.glob("journal/*")
        ):
            time.sleep(0.1)
        log = logging.getLogger("third.party")
        log.addHandler(logging.StreamHandler())
        log.error("cannot log in at %s", uri)
        warnings.warn(f"the password {word} is old")
        thread = threading.Thread(target=lambda: int(token))
        thread.start()
        thread.join()
        raise RuntimeError(f"robot:{token} is refused at {uri}, as is {word}")

hooks.StepJournal.after_step = after_step
del sys.argv[-1]
sys.exit(main())
"""


@pytest.mark.promise("no file of a run and no output contains a secret of its environment, for every crash")
@pytest.mark.multiprocess
def test_no_file_and_no_output_of_a_crashing_run_holds_a_secret_of_its_environment(
    small_corpus: Path, tmp_path: Path
) -> None:
    overrides = ("training.steps=4", "tracking.mlflow.enabled=true", "tracking.mlflow.uri=env:PLACE_OF_MLFLOW")
    arguments = tiny(small_corpus, tmp_path / "runs", "crashed", *overrides)
    secrets = {"PLACE_OF_MLFLOW": URI, "SERVICE_PASSWORD": WORD, "PLANTED": TOKEN, "SLURM_JOB_ID": f"7 {TOKEN}"}
    done = subprocess.run(
        [sys.executable, "-c", CRASH, "train", *arguments, "--json", str(tmp_path / "runs" / "crashed")],
        capture_output=True,
        text=True,
        timeout=280,
        env=environment() | secrets,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    for trace in ("cannot log in at ***", "the password *** is old", "RuntimeError: *** is refused at ***"):
        assert trace in done.stderr
    assert "invalid literal for int() with base 10: '***'" in done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert answer["exit_code"] == 1
    assert "is refused at ***, as is ***" in answer["error"]
    run_dir = tmp_path / "runs" / "crashed"
    journal = "".join(path.read_text() for path in (run_dir / "journal").iterdir())
    assert '"incident":"mlflow_outage"' in journal
    assert "is refused at ***" in journal
    assert "is refused at ***" in (run_dir / "status.json").read_text()
    assert "is refused at ***" in (run_dir / "attempts" / "0001" / "rank-00000.json").read_text()
    assert 'uri: "env:PLACE_OF_MLFLOW"' in (run_dir / "config" / "attempt-0001.yaml").read_text()
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert_nowhere(done.stdout, done.stderr, *(path.read_bytes().decode("latin-1") for path in files))


@pytest.mark.promise("a refused override shows no secret")
@pytest.mark.parametrize(
    "argument",
    [
        "training.steps={}",
        "no.such.key={}",
        "{}",
        "run.name={}",
        "optimizer.learning_rate=[{}]",
        "tracking.mlflow.uri='{}",
        "--{}",
        "data.corpora.{}=x",
    ],
)
@pytest.mark.parametrize("secret", [TOKEN, URI, WORD])
def test_refused_override_does_not_show_a_secret_of_the_environment(
    argument: str, secret: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DATABASE_PASSWORD", TOKEN)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", WORD)
    arguments = tiny(tmp_path, tmp_path / "runs", "bad", argument.format(secret))
    assert cli.main(["train", *arguments, "--json"]) == 2
    written = capsys.readouterr()
    assert json.loads(written.out)["exit_code"] == 2
    assert_nowhere(written.out, written.err)
    assert not (tmp_path / "runs").exists()


def test_stored_config_is_the_config_with_registered_values_masked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLACE_OF_MLFLOW", URI)
    overrides = ["tracking.mlflow.uri=env:PLACE_OF_MLFLOW", f"run.output_dir=/data/{TOKEN}/runs"]
    config = load_train_config(write_configs(tmp_path), overrides).config
    register_references(config)
    path = store_attempt_config(tmp_path, 1, config)
    assert_nowhere(path.read_text())
    read_back = load_train_config(path).config
    assert read_back.run.output_dir == "/data/***/runs"
    assert read_back.tracking == config.tracking
    assert (read_back.model, read_back.training) == (config.model, config.training)


def test_error_that_a_rank_leaves_for_its_launcher_is_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register_secret(WORD)
    monkeypatch.setenv("MEGAMASK_RANK_REPORT", str(tmp_path / "report.json"))
    error = UsageError(f"{WORD} is not allowed", hint=f"not {WORD}")
    error.details = {"reason": f"so {WORD}"}
    assert leave_report(redacted(error))
    assert_nowhere((tmp_path / "report.json").read_text(), str(error), repr(error), json.dumps(error.details))


def test_values_are_masked_and_names_stay() -> None:
    register_secret(WORD)
    given = {"problem": f"at {WORD}", WORD: [1, None, {"deep": (f"{WORD}!", 2.5)}]}
    assert redact_values(given) == {"problem": "at ***", WORD: [1, None, {"deep": ["***!", 2.5]}]}


@pytest.mark.parametrize(
    "text",
    [
        URI,
        TOKEN,
        quote(TOKEN, safe=""),
        f"Authorization: {base64.b64encode(f'robot:{TOKEN}'.encode()).decode()}",
        f"user robot with {TOKEN}, at 127.0.0.1",
        f"{URI}/api/2.0/mlflow/runs/search",
        repr(URI),
        json.dumps({"a": URI}),
    ],
)
def test_registered_uri_is_masked_with_all_its_parts_and_spellings(text: str) -> None:
    register_secret(URI)
    assert_nowhere(redact(f"x {text} y"))
    assert redact(redact(text)) == redact(text)


def test_harmless_parts_of_a_registered_uri_stay_readable() -> None:
    register_secret(f"https://robot:{WORD}@mlflow.example.org/path?verbose=true&token=abcd1234")
    kept = "robot at mlflow.example.org is verbose: true"
    assert redact(kept) == kept
    assert redact("abcd1234") == "***"


def test_secret_that_begins_with_another_is_masked_whole() -> None:
    register_secret("abcd")
    register_secret("abcd1234")
    assert redact("abcd1234 abcd") == "*** ***"


def test_words_of_fewer_than_four_characters_are_not_masked() -> None:
    register_secret("abc")
    assert redact("abcdef abc") == "abcdef abc"


@pytest.mark.parametrize("name", ["HF_TOKEN", "MLFLOW_TRACKING_PASSWORD", "AWS_SECRET_ACCESS_KEY", "my_api_key"])
def test_variable_whose_name_says_secret_is_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, WORD)
    redaction.register_environment()
    assert redact(f"so {WORD}.") == "so ***."


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "SSH_AUTH_SOCK", "KEYBOARD", "HOME"])
def test_variable_whose_name_does_not_say_secret_is_not_masked(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, WORD)
    redaction.register_environment()
    assert redact(f"so {WORD}.") == f"so {WORD}."


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process's own output as the command line redacts it, put back afterwards."""
    from megamask.provenance import redacted_output

    factory, hooks = logging.getLogRecordFactory(), (threading.excepthook, sys.unraisablehook)
    format_warning = warnings.formatwarning
    threading.excepthook, sys.unraisablehook = threading.__excepthook__, sys.__unraisablehook__
    redacted_output.install()
    once = logging.getLogRecordFactory(), warnings.formatwarning, threading.excepthook
    redacted_output.install()
    assert (logging.getLogRecordFactory(), warnings.formatwarning, threading.excepthook) == once
    yield
    logging.setLogRecordFactory(factory)
    threading.excepthook, sys.unraisablehook = hooks
    warnings.formatwarning = format_warning


@pytest.mark.promise("log records, traces of threads and warnings are redacted for every handler")
@pytest.mark.usefixtures("installed")
def test_log_record_is_redacted_for_every_handler(caplog: pytest.LogCaptureFixture) -> None:
    register_secret(WORD)
    log = logging.getLogger("some.library")
    log.warning("login %s failed %d times", WORD, 3)
    log.warning(*("too few arguments: %s %s", WORD))
    try:
        raise ValueError(WORD)
    except ValueError:
        log.exception("so it is")
    assert "login *** failed 3 times" in caplog.text
    assert "ValueError: ***" in caplog.text
    assert_nowhere(caplog.text, *(str(vars(record)) for record in caplog.records[:2]))


@pytest.mark.promise("no log call raises what an object's text raises; a log record's stack is redacted")
@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("error", [ValueError, RuntimeError, AttributeError, OSError])
@pytest.mark.parametrize("has_repr", [True, False])
def test_log_call_with_an_object_whose_text_raises_ends_nobody(
    error: type[Exception], has_repr: bool, caplog: pytest.LogCaptureFixture
) -> None:
    register_secret(WORD)

    class Textless:
        def __str__(self) -> str:
            raise error(WORD)

        def __repr__(self) -> str:
            return f"<{WORD}>" if has_repr else str(self)

    log = logging.getLogger("some.library")
    log.warning("it holds %s", Textless())
    log.warning(Textless())  # type: ignore[arg-type]
    first, second = (record.getMessage() for record in caplog.records)
    assert first == (
        "it holds %s (<***>,)" if has_repr else f"a log message of some.library without a text ({error.__name__})"
    )
    assert second == f"a log message of some.library without a text ({error.__name__})"
    assert_nowhere(caplog.text)


@pytest.mark.promise("no log call raises what an object's text raises; a log record's stack is redacted")
@pytest.mark.usefixtures("installed")
def test_stack_of_a_log_record_is_redacted(caplog: pytest.LogCaptureFixture) -> None:
    register_secret("shown_by_its_source")
    logging.getLogger("some.library").warning("here", stack_info=bool("shown_by_its_source"))
    assert "Stack (most recent call last)" in caplog.text
    assert 'stack_info=bool("***")' in caplog.text


@pytest.mark.promise("log records, traces of threads and warnings are redacted for every handler")
@pytest.mark.usefixtures("installed")
def test_traces_of_threads_and_finalizers_and_warnings_are_redacted(capsys: pytest.CaptureFixture[str]) -> None:
    register_secret(WORD)

    class Fails:
        def __del__(self) -> None:
            raise ValueError(os.environ.get("NONE", WORD))

    thread = threading.Thread(target=lambda: int(WORD))
    thread.start()
    thread.join()
    del_me = Fails()
    del del_me
    assert_nowhere(capsys.readouterr().err, warnings.formatwarning(f"old {WORD}", UserWarning, "x.py", 3))
