"""Configuration of the collect command."""

from dataclasses import dataclass, field
from typing import Literal

from trimtab.errors import UsageError
from trimtab.jobs.judges.config import JudgeConfig
from trimtab.jobs.runtime.config import ScaleConfig
from trimtab.types import DEFAULT_BASE, AnswerKind, Attack, DType, Label, Subject

MOST_SAMPLES = 100


@dataclass(frozen=True)
class CollectConfig:
    """Store the model's signals on answers or prompts, the training data of detectors.

    Args:
        questions: sources of questions with reference answers: files, trimtab:NAME, or Hugging Face datasets.
        out: folder of the data set; rerunning the same command resumes an interrupted collection.
        subject: subject of the detectors: answer for answers to questions, prompt for prompts.
        data: sources of labeled prompts for --subject prompt: files with a class, trimtab:guard (all packaged prompts),
            trimtab:NAME, or Hugging Face datasets.
        label: class of prompts without one: harmful, benign_hard or benign_easy.
        attacks: rewrites of each prompt to collect as well, which make a detector more robust, or all.
        read_answers: read answers from the files instead of generating them: each row has `answer`, and `truthful` or
            `hallucinated` if the label is known, or lists in `correct_answers` and `incorrect_answers`.
        answer_separator: separator between several supplied answers in one text.
        columns: other names of the fields, as --columns.answers NAME: question, answers, context, kind, source, group; and
            answer, truthful, hallucinated, correct_answers, incorrect_answers; for prompts: prompt, class, system, messages,
            source, group.
        kind: comparison of answers: exact, contains, f1 or numeric; if omitted, the kind of each question, else contains.
        judge: judge of the answers: string compares as `kind` specifies; endpoint asks a language model if an answer is right.
        base: base model: catalog name, folder, or Hugging Face id.
        revision: revision of a Hugging Face id.
        prefix: prefix to generate under: NAME, NAME@VERSION, or a folder; no prefix if omitted.
        layers: layers whose states are collected, 0 being the embeddings; if omitted, one at two thirds of the depth and the
            last; for prompts, four from half to three quarters of the depth.
        max_tokens: maximum length of each answer, in tokens.
        max_model_len: maximum length of a prompt and its answer together, in tokens; longer questions are skipped and counted.
        limit: maximum number of questions; 0 for all.
        num_samples: additional sampled answers per question, which some scores and the sep head need: 10 are enough; each costs
            as many tokens as an answer.
        temperature: sampling temperature of the samples.
        unfinished: store the signals of each unfinished answer at every 4 tokens as well, which calibrate a policy that stops
            answers.
        p_true: ask the model if each answer is true, for the score p-true; costs one token.
        dtype: data type of the model; auto is bf16 if the machine supports it, else fp32.
        scale: number of engines and their cluster resources.
    """

    questions: list[str] | str = ""
    out: str = ""
    subject: Subject = "answer"
    data: list[str] | str = ""
    label: Label | None = None
    attacks: list[Attack] | Literal["all"] = field(default_factory=list[Attack])
    read_answers: bool = False
    answer_separator: str | None = None
    columns: dict[str, str] = field(default_factory=dict[str, str])
    kind: AnswerKind | None = None
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    base: str = DEFAULT_BASE
    revision: str | None = None
    prefix: str | None = None
    layers: list[int] = field(default_factory=list[int])
    max_tokens: int = 48
    max_model_len: int = 2048
    limit: int = 0
    num_samples: int = 0
    temperature: float = 1.0
    p_true: bool = False
    dtype: DType = "auto"
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    unfinished: bool = False

    def __post_init__(self) -> None:
        if self.subject == "prompt":
            self._check_prompt_settings()
        elif not self.questions or not self.out or self.data or self.label or self.attacks:
            raise UsageError("questions and out are required. Pass --questions FILE (or trimtab:countries) --out FOLDER")
        if self.max_tokens < 1 or self.limit < 0:
            raise UsageError("max_tokens must be at least 1, and limit must not be below 0")
        if self.max_model_len <= self.max_tokens:
            raise UsageError(f"max_model_len must be above max_tokens ({self.max_tokens}), not {self.max_model_len}")
        if not 0 <= self.num_samples <= MOST_SAMPLES:
            raise UsageError(f"num_samples must be from 0 to {MOST_SAMPLES}, not {self.num_samples}")
        if not 0 < self.temperature <= 2:
            raise UsageError(f"temperature must be above 0 and at most 2, not {self.temperature}, as samples must differ")
        if self.judge.kind == "classifier":
            raise UsageError("--judge.kind classifier detects refusals, not right answers. Use string or endpoint")
        if self.read_answers and self.judge.kind != "string":
            raise UsageError("--read_answers true takes the labels from the files. Omit --judge.kind")

    def _check_prompt_settings(self) -> None:
        if not self.data or not self.out:
            raise UsageError("data and out are required. Pass --subject prompt --data FILE (or trimtab:guard) --out FOLDER")
        of_answers = self.questions, self.read_answers, self.num_samples, self.p_true, self.answer_separator, self.kind
        if any(of_answers) or self.unfinished:
            raise UsageError("--subject prompt generates no answers. Omit the options of questions, answers and samples")
