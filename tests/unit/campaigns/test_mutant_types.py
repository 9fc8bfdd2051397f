"""Which of mypy's errors are a mutant's."""

from __future__ import annotations

from pathlib import Path

from tests.campaigns.mutant_types import MutantError, functions, of_mutants


def test_an_error_that_the_unchanged_function_has_too_is_no_mutants() -> None:
    errors = [
        MutantError("f__mutmut_orig", "a", "1"),
        MutantError("f__mutmut_1", "a", "2"),
        MutantError("f__mutmut_2", "b", "3"),
        MutantError("g__mutmut_1", "a", "4"),
        MutantError(None, "b", "5"),
    ]
    assert of_mutants(errors) == ["3", "4"]


def test_only_mutants_and_unchanged_functions_are_found(tmp_path: Path) -> None:
    file = tmp_path / "m.py"
    file.write_text("def f():\n    pass\n\n\nclass C:\n    def f__mutmut_orig(self):\n        return 1\n")
    assert functions(file) == [(6, 7, "f__mutmut_orig")]
