import quant_engine


def test_everything_that_is_promised_can_be_imported_from_the_package() -> None:
    for name in quant_engine.__all__:
        assert getattr(quant_engine, name).__name__ == name


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    assert all(callable(getattr(quant_engine, name)) for name in ("convert", "evaluate", "export", "load", "plan"))
