"""PTX text to instructions: one entry, its parameters, registers, labels and nested scopes."""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Unknown(NotImplementedError):
    """The machine does not know this form, and guesses nothing."""


@dataclass(frozen=True)
class Instruction:
    """``@guard opcode operands;`` as it stands in ``line`` of the text."""

    opcode: str
    operands: tuple[str, ...]
    guard: str | None
    negated: bool
    line: int

    def __str__(self) -> str:
        guard = f"@{'!' * self.negated}{self.guard} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}".strip()

    def registers(self) -> set[str]:
        return set(re.findall(r"%(?:r|rd|rs|p|f|h|fd)\d+", " ".join(self.operands)))


@dataclass
class Program:
    name: str = ""
    parameters: list[str] = field(default_factory=list)
    threads: int = 0  # of a block
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    registers: dict[str, tuple[int, int]] = field(default_factory=dict)  # width in bits (1), row
    rows: dict[int, int] = field(default_factory=dict)  # registers of each width

    def declare(self, name: str, width: int) -> None:
        self.registers[name] = width, self.rows.setdefault(width, 0)
        self.rows[width] += 1


DIRECTIVE = re.compile(r"\.(?:loc|file|section|pragma|param|align)\b")
INSTRUCTION = re.compile(r"(?:@(!?)([%$\w.]+)\s+)?([a-z][\w.:]*)\s*(.*)", re.S)
LABEL = re.compile(r"([$A-Za-z_][\w$]*)\s*:(?!:)")
REGISTERS = re.compile(r"\.reg\s+\.(pred|[busf](\d+))\s+(.*)", re.S)


def operands_of(text: str) -> tuple[str, ...]:
    """Split at the commas outside braces and brackets."""
    parts, depth, part = [], 0, ""
    for character in text:
        depth += (character in "{[") - (character in "}]")
        if character == "," and not depth:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return tuple([*parts, part.strip()] if part.strip() else parts)


def registers_in(operand: str) -> list[str]:
    """The elements of ``{a, b}``; of a plain operand, itself."""
    return [part.strip() for part in operand.strip("{} ").split(",")]


def statements(text: str, line: int) -> list[tuple[int, str]]:
    """(line, statement) of a function's body; braces of scopes and labels stand alone."""
    found, buffer, start = [], "", line
    position = 0
    while position < len(text):
        character = text[position]
        if not buffer.strip():
            buffer, start = "", line
            if label := LABEL.match(text, position):
                found.append((line, label[0].replace(" ", "")))
                position = label.end()
                continue
            if character in "{}":
                found.append((line, character))
                position += 1
                continue
        line += character == "\n"
        position += 1
        if character == ";":
            found.append((start, buffer.strip()))
            buffer = ""
        else:
            buffer += character
    return found


def parse(text: str) -> Program:
    """The program of a text's one entry."""
    kept = re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    kept = re.sub(r"(?m)^\s*\.(?:loc|file)\b[^\n]*", "", kept)
    entry = kept.index(".entry")
    opening = kept.index("{", entry)
    header = kept[entry:opening]
    program = Program(re.search(r"\.entry\s+(\w+)", header)[1])
    listed = header.partition("(")[2].rpartition(")")[0]
    program.parameters = re.findall(r"(\w+)(?:\[\d+\])?\s*(?:,|$)", listed)
    if threads := re.search(r"\.(?:req|max)ntid\s+(\d+)", header):
        program.threads = int(threads[1])
    scopes: list[dict[str, str]] = []
    for line, statement in statements(kept[opening:], kept.count("\n", 0, opening) + 1):
        if statement == "{":
            scopes.append({})
        elif statement == "}":
            scopes.pop()
            if not scopes:
                return program
        else:
            add(program, scopes, statement, line)
    raise SyntaxError("the function does not end")


def add(program: Program, scopes: list[dict[str, str]], statement: str, line: int) -> None:
    """One statement of a body; names of inner scopes get the line, which makes them unique."""
    inner = scopes[-1] if len(scopes) > 1 else None
    if inner is not None:
        if (label := LABEL.fullmatch(statement)) or " .reg" in f" {statement}":
            for name in [label[1]] if label else statement.split(None, 2)[2].split(","):
                inner[name.strip()] = f"{name.strip()}${line}"
        for scope in scopes:
            for name, unique in scope.items():
                pattern = rf"(?<![\w$%]){re.escape(name)}(?![\w$])"
                statement = re.sub(pattern, unique.replace("\\", ""), statement)
    if label := LABEL.fullmatch(statement):
        program.labels[label[1]] = len(program.code)
    elif registers := REGISTERS.fullmatch(statement):
        width = int(registers[2] or 1)
        for name in registers[3].split(","):
            many = re.fullmatch(r"\s*(.*?)<(\d+)>\s*", name)
            for each in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name.strip()]:
                program.declare(each, width)
    elif not DIRECTIVE.match(statement):
        found = INSTRUCTION.fullmatch(statement)
        if found is None:
            raise Unknown(f"line {line}: {statement}")
        program.code.append(
            Instruction(found[3], operands_of(found[4]), found[2], found[1] == "!", line)
        )
