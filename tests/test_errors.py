from modicum.errors import MissingExtraError, ModicumError, did_you_mean


def test_a_close_name_is_suggested_and_otherwise_all_are_listed():
    assert did_you_mean("densty", ["density", "scale"]) == "Did you mean 'density'?"
    assert did_you_mean("qqq", ["density", "scale"]) == "Known: density, scale."


def test_a_missing_extra_names_the_install_command():
    error = MissingExtraError("gguf", "demo")
    assert isinstance(error, ModicumError) and isinstance(error, ImportError)
    assert "pip install 'modicum[demo]'" in str(error)
