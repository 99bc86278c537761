"""What ``scq app`` takes from its command line, its environment and its file with a password."""

import os
from pathlib import Path

import httpx
import pytest

from scq.cli.generate import _login, _shield_gradio
from scq.cli.main import build_parser
from scq.engine.errors import UserError
from scq.sampling.app import serve
from scq.sampling.studio.page import Page


def login_of(*arguments: str) -> tuple[str, str] | None:
    return _login(build_parser().parse_args(["app", *arguments]))


def test_a_password_need_not_be_in_the_list_of_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SCQ_AUTH", raising=False)
    assert login_of() is None
    file = tmp_path / "auth"
    file.write_text("ada:in a:file \n")
    assert login_of("--auth-file", str(file)) == ("ada", "in a:file")
    assert login_of("--auth", "ada:visible") == ("ada", "visible")
    monkeypatch.setenv("SCQ_AUTH", "ada:from the environment")
    assert login_of() == ("ada", "from the environment")
    assert login_of("--auth-file", str(file)) == ("ada", "in a:file")
    for text in ("", "ada", "ada:", ":secret"):
        monkeypatch.setenv("SCQ_AUTH", text)
        with pytest.raises(UserError, match="SCQ_AUTH must be USER:PASSWORD"):
            login_of()
        file.write_text(text)
        with pytest.raises(UserError, match=r"first line of .*auth must be USER:PASSWORD"):
            login_of("--auth-file", str(file))
    with pytest.raises(UserError, match="No such file"):
        login_of("--auth-file", str(tmp_path / "none"))


def test_a_password_can_be_typed_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an editor of another system adds is no part of the name, and nothing is cut off in silence."""
    file = tmp_path / "auth"
    for written in (b"\xef\xbb\xbfada:secret\r\n", b" ada : secret \nbob:other\n", "ada: ßecret☃".encode()):
        file.write_bytes(written)
        user, password = login_of("--auth-file", str(file)) or ("", "")
        assert (user, password.strip()) in {("ada", "secret"), ("ada", "ßecret☃")}
    for text in ("ada:sec\u2028ret", "ada:sec\fret", "ada:sec\rbob:other", "ada:sec\x01ret"):
        file.write_text(text, newline="")
        monkeypatch.setenv("SCQ_AUTH", text)
        for arguments in (["--auth-file", str(file)], ["--auth", text], []):
            with pytest.raises(UserError, match="cannot be typed"):
                login_of(*arguments)
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, Path("/dev/zero")):
        with pytest.raises(UserError, match="not a file"):
            login_of("--auth-file", str(path))


def test_a_password_that_everybody_can_read_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "auth"
    file.write_text("ada:secret")
    for mode, lines in ((0o600, 0), (0o640, 0), (0o444, 1)):
        file.chmod(mode)
        assert login_of("--auth-file", str(file)) == ("ada", "secret")
        said = capsys.readouterr().err
        assert said.count("\n") == lines
        assert "secret" not in said
    assert "everybody on this machine may read" in said


def test_the_environment_opens_nothing(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Gradio takes what it is not told from variables, and asks for its own page through a proxy."""
    for name in [name for name in os.environ if name.startswith("GRADIO_")]:
        monkeypatch.delenv(name)
    variables = {"GRADIO_SHARE": "True", "GRADIO_ALLOWED_PATHS": "/", "GRADIO_SERVER_PORT": "x"}
    kept = {"GRADIO_TEMP_DIR": "/mine", "HTTP_PROXY": "http://192.0.2.7:9", "NO_PROXY": "", "no_proxy": ""}
    for name, value in (variables | kept).items():
        monkeypatch.setenv(name, value)
    _shield_gradio()
    assert [name for name in os.environ if name.startswith("GRADIO_")] == ["GRADIO_TEMP_DIR"]
    assert capsys.readouterr().err.startswith("scq: GRADIO_ALLOWED_PATHS, GRADIO_SERVER_PORT, GRADIO_SHARE of")
    assert not httpx.Client()._mounts, "no proxy"
    monkeypatch.setenv("GRADIO_SHARE", "True")
    with Page() as page:
        pass
    serve(page, "127.0.0.1", None, block=False)
    page.close()
    assert not page.share


@pytest.mark.parametrize(
    ("option", "sound", "unsound"),
    [
        (
            "--root-path",
            ["", "/", "/scq", "https://example.org", "http://[::1]:80/scq"],
            [
                "scq",
                "//evil.example",
                "http://",
                "http://[::1",
                "https://a b/",
                "/a?b",
                "https://u:p@h/scq",
                "http://h:x",
            ],
        ),
        (
            "--name",
            ["box", "Example.org", "10.1.2.3", "my_box"],
            ["", "box:80", "http://box", "*", "a b", "a/b", "u@box", "[::1"],
        ),
        ("--port", ["80"], ["0", "65536", "²", "8" * 5000]),
    ],
)
def test_an_option_without_effect_is_refused(
    option: str, sound: list[str], unsound: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    for text in sound:
        build_parser().parse_args(["app", option, text])
    for text in unsound:
        with pytest.raises(SystemExit):
            build_parser().parse_args(["app", option, text])
        assert f"{text!r} is n" in capsys.readouterr().err


def test_a_server_does_not_keep_freed_memory() -> None:
    assert not build_parser().parse_args(["app"]).keep_freed_memory
    assert build_parser().parse_args(["train", "prior", "--config", "a"]).keep_freed_memory
