"""Findings of an audit, and what was and was not checked."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True, order=True)
class Finding:
    """A disagreement: its file, line (0 means the file as such) and a sentence."""

    file: str
    line: int
    problem: str

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.problem}" if self.line else f"{self.file}: {self.problem}"


@dataclass
class Report:
    """Results of an audit so far; findings about a corpus have an exit code of their own.

    Args:
        covered, not_covered: noun phrases, for the sentence that ends the answer.
    """

    findings: list[Finding] = field(default_factory=list)
    corpus_findings: list[Finding] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    covered: list[str] = field(default_factory=list)
    not_covered: list[str] = field(default_factory=list)

    def find(self, file: str, problem: str, line: int = 0) -> None:
        """Add a finding about the run."""
        self.findings.append(Finding(file=file, line=line, problem=problem))

    def find_corpus(self, name: str, problem: str) -> None:
        """Add a finding about a corpus of the run."""
        self.corpus_findings.append(Finding(file=f"data.corpora.{name}", line=0, problem=problem))

    def expect(self, file: str, what: str, found: object, expected: object, source: str) -> None:
        """Add a finding if two values differ; `source` names the record that `expected` comes from."""
        if found != expected:
            self.find(file, f"{what} is {found!r}; {source} has {expected!r}")
