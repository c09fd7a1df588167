"""A small world of film reviews whose language is known exactly, so that drift is measured and not estimated.

A review has a latent sentiment (0 negative, 1 positive, each 1/2), an opening sentence without any opinion, and one or
more opinion sentences. Everything below is one hidden Markov model: a state is a slot of a template, and the forward
algorithm (Rabiner, 1989, "A tutorial on hidden Markov models", section III.A) gives the exact probability of any text.

The language is fragile on purpose: number agreement, a/an, an intensifier stands before an adjective. Its sentiment is
sparse: opinion sentences have about one opinion word in nine, which sides with the review's label 17 times in 20, so
that one word of praise brings the posterior of the positive label to 0.85 and two bring it to 0.97. A classifier that
is trained on such reviews asks for praise and not for grammar: the reward can be hacked, as real ones can.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Words of a class run from the most to the least frequent. `NAME.variant` is one form of a class that agrees with its
# surroundings; a slot that names the class alone takes all its forms.
WORDS: Mapping[str, str] = {
    "SPEAKER": "i we they",
    "SAW": "watched saw rented caught discovered",
    "WORK": "film movie picture sequel remake",
    "GENRE": "comedy thriller drama western mystery musical romance",
    "WHEN": "night week month monday friday sunday summer winter",
    "PLACE": "cinema theatre festival museum school club",
    "CITY": "paris london rome berlin vienna boston chicago tokyo",
    "PERSON": "brother sister friend mother father wife husband neighbour cousin",
    "NAME": "maria peter anna james helen victor alice oscar",
    "INTENSIFIER": "very really truly quite rather deeply",
    "A.a": "a",
    "A.an": "an",
    "DETERMINER.one": "the this that every",
    "DETERMINER.many": "the these those some",
    "NOUN.one": "plot story script scene ending character dialogue song idea joke costume chase dream twist hero "
    "speech performance soundtrack",
    "NOUN.many": "actors scenes characters jokes songs costumes effects ideas images voices colours lines heroes "
    "twists dreams secrets dances puppets",
    "BE.one": "was is",
    "BE.many": "were are",
    "SEEM.one": "seems feels looks sounds",
    "SEEM.many": "seem feel look sound",
    "SHOW.one": "shows follows reveals carries hides frames repeats mirrors",
    "SHOW.many": "show follow reveal carry hide frame repeat mirror",
    "ROLE.a": "doctor soldier priest painter widow sailor lawyer",
    "ROLE.an": "artist orphan officer engineer inspector",
    "PLAIN.a": "long quiet modern dark short strange french silent familiar simple",
    "PLAIN.an": "old early english unusual urban italian",
}

# Opinion classes: words of praise, words of blame.
OPINIONS: Mapping[str, tuple[str, str]] = {
    "QUALITY.a": (
        "wonderful great brilliant superb charming lovely delightful clever beautiful moving graceful perfect",
        "terrible bad boring dull horrible poor dreadful clumsy lifeless silly tedious weak",
    ),
    "QUALITY.an": (
        "excellent amazing enjoyable elegant engaging inspired",
        "awful ugly annoying inept unbearable empty",
    ),
    "JUDGED": ("enjoyed loved admired adored praised cherished", "hated disliked endured regretted resented despised"),
    "VERDICT": ("joy treat triumph delight gem success", "mess bore failure disaster waste chore"),
}

# Marks on a slot: all slots of a sentence with the same mark take the same form, drawn with these probabilities.
AGREEMENTS: Mapping[str, Mapping[str, float]] = {"#": {"one": 0.6, "many": 0.4}, "~": {"a": 0.7, "an": 0.3}}
OPTIONAL = 0.5  # probability that a slot marked "?" is filled

# Sentence templates and their weights. Upper case is a class, lower case is the word itself.
OPENINGS: Mapping[str, float] = {
    "SPEAKER SAW this PLAIN? WORK with my PERSON last WHEN .": 3,
    "last WHEN SPEAKER SAW A~ PLAIN~ GENRE at the PLACE .": 3,
    "this WORK BE.one A~ PLAIN~ GENRE set in CITY .": 2,
    "NAME plays A~ ROLE~ in this PLAIN? GENRE from CITY .": 2,
}
# No sentence has two opinions closer than three words, and none is shorter than seven: that is what bounds the reward.
SENTENCES: Mapping[str, float] = {
    "DETERMINER# NOUN# in this WORK BE# INTENSIFIER? QUALITY .": 4,
    "SPEAKER thought DETERMINER# NOUN# BE# INTENSIFIER? QUALITY .": 4,
    "DETERMINER# PLAIN? NOUN# SEEM# QUALITY to my PERSON .": 3,
    "it BE.one A~ QUALITY~ GENRE with some PLAIN? NOUN.many .": 3,
    "SPEAKER JUDGED DETERMINER# PLAIN? NOUN# of the WORK .": 3,
    "NAME BE.one INTENSIFIER QUALITY as A~ ROLE~ .": 2,
    "my PERSON called DETERMINER# NOUN# a real VERDICT .": 2,
    "when DETERMINER# NOUN# SHOW# the NOUN.one , it SEEM.one QUALITY .": 2,
    "in the end DETERMINER# NOUN# BE# QUALITY and INTENSIFIER QUALITY for a GENRE from CITY .": 1,
    "DETERMINER# NOUN# SHOW# the PLAIN NOUN.one of CITY .": 1,
}
STOP = 0.5  # probability that a review ends after an opinion sentence
SIDING = 0.85  # probability that an opinion word sides with the review's label


@dataclass(frozen=True, eq=False)
class ReviewGrammar:
    """A hidden Markov model over words (`V` words, `S` states; state 0 stands before the first word and emits nothing).

    `transition` [S, S] is the next state given that the review goes on (rows sum to 1), `emission` [2, S, V] the word
    by label and state, `end` [S] the probability that the review ends after the state. All are float64.

    A text is words with spaces between them; more than one space is one. Probabilities are natural logarithms.

    `noise` mixes in a typist who errs with that probability: a word is then uniform over the V words (an unknown word
    counts as one of them), and so is the choice to end: `end` becomes `(1 - noise) * end + noise / V`, which makes
    a wrong ending about as unlikely as a wrong word. The states move as before. With noise > 0 every text is finite.
    """

    words: list[str]
    states: list[str]
    transition: np.ndarray
    emission: np.ndarray
    end: np.ndarray

    def sample(self, n: int, seed: int) -> tuple[list[str], list[int]]:
        """Draw `n` whole reviews and their labels."""
        rng = np.random.default_rng(seed)
        labels = rng.integers(0, 2, n)
        states, alive = np.zeros(n, dtype=int), np.arange(n)
        reviews: list[list[str]] = [[] for _ in range(n)]
        next_state, next_word = _cumulative(self.transition), _cumulative(self.emission)
        while alive.size:
            states[alive] = _draw(next_state[states[alive]], rng)
            for i, word in zip(alive, _draw(next_word[labels[alive], states[alive]], rng), strict=True):
                reviews[i].append(self.words[word])
            alive = alive[rng.random(alive.size) >= self.end[states[alive]]]
        return [" ".join(review) for review in reviews], labels.tolist()

    def log_probability(self, text: str, complete: bool = True, noise: float = 0.0) -> float:
        """Nats of `text` as a whole review, or with `complete=False` of a review that starts with it; may be -inf."""
        return float(self.log_probabilities([text], complete, noise)[0])

    def log_probabilities(
        self, texts: Sequence[str], complete: bool | Sequence[bool] = True, noise: float = 0.0
    ) -> np.ndarray:
        """`log_probability` of each text [N]; `complete` is one for all or one a text."""
        return np.logaddexp(*self.label_log_probabilities(texts, complete, noise))

    def label_log_probabilities(
        self, texts: Sequence[str], complete: bool | Sequence[bool] = True, noise: float = 0.0
    ) -> np.ndarray:
        """Nats of each text together with each label [2, N], by the forward algorithm.

        Forward probabilities are rescaled to sum to 1 after every word, so that long texts do not underflow.
        """
        ids, lengths = self._encode(texts)
        emission, end = self._noisy(noise)
        alpha = self._at_start(len(texts))
        log_scale = np.full((2, len(texts)), np.log(0.5))
        with np.errstate(divide="ignore"):
            for t in range(ids.shape[1]):
                running = np.flatnonzero(t < lengths)
                ahead = (alpha[:, running] * (1 - end)) @ self.transition * emission[:, ids[running, t]]
                scale = ahead.sum(-1)
                alpha[:, running] = ahead / np.where(scale > 0, scale, 1)[..., None]
                log_scale[:, running] += np.log(scale)
            return log_scale + np.where(complete, np.log(alpha @ end), 0)

    def accepts(self, text: str, complete: bool = True) -> bool:
        """Whether `text` is a possible review, or with `complete=False` the beginning of one."""
        return bool(self.accepts_each([text], complete)[0])

    def accepts_each(self, texts: Sequence[str], complete: bool | Sequence[bool] = True) -> np.ndarray:
        """`accepts` of each text [N], bool: the sets of reachable states are followed, so nothing can underflow."""
        ids, lengths = self._encode(texts)
        emission, end = self._noisy(0.0)
        goes_on = ((1 - end)[:, None] * self.transition > 0).astype(float)
        reached = self._at_start(len(texts)) > 0
        for t in range(ids.shape[1]):
            running = np.flatnonzero(t < lengths)
            reached[:, running] = (reached[:, running] @ goes_on > 0) & (emission[:, ids[running, t]] > 0)
        final = np.where(np.asarray(complete)[..., None], end > 0, True)
        return (reached & final).any((0, 2))

    def positive_probability(self, text: str, noise: float = 0.0) -> float:
        """Bayes' posterior of the positive label given `text`; nan for a text that cannot be."""
        return float(self.positive_probabilities([text], noise)[0])

    def positive_probabilities(self, texts: Sequence[str], noise: float = 0.0) -> np.ndarray:
        """`positive_probability` of each text [N]. Ends do not depend on the label: a whole review or a part is one."""
        negative, positive = self.label_log_probabilities(texts, complete=False, noise=noise)
        with np.errstate(invalid="ignore"):
            return np.exp(positive - np.logaddexp(negative, positive))

    @functools.cached_property
    def _ids(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}

    def _encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Word ids [N, T], padded at the right, and lengths [N]. An unknown word, like padding, is V."""
        split = [text.split() for text in texts]
        lengths = np.array([len(words) for words in split], dtype=int)
        ids = np.full((len(split), max(lengths, default=0)), len(self.words))
        for row, words in zip(ids, split, strict=True):
            row[: len(words)] = [self._ids.get(word, len(self.words)) for word in words]
        return ids, lengths

    def _noisy(self, noise: float) -> tuple[np.ndarray, np.ndarray]:
        """Emissions by word [2, V + 1, S], the unknown word last, and ends [S], both with the noise mixed in."""
        emission = np.pad(self.emission, ((0, 0), (0, 0), (0, 1))).swapaxes(1, 2)
        share = noise / len(self.words)
        return (1 - noise) * emission + share, (1 - noise) * self.end + share

    def _at_start(self, n: int) -> np.ndarray:
        """Forward probabilities [2, N, S] before the first word."""
        alpha = np.zeros((2, n, len(self.states)))
        alpha[:, :, 0] = 1
        return alpha


@functools.cache
def review_grammar() -> ReviewGrammar:
    """The film reviews of this module's tables."""
    return build_grammar(WORDS, OPINIONS, OPENINGS, SENTENCES, STOP, SIDING)


def build_grammar(
    words: Mapping[str, str],
    opinions: Mapping[str, tuple[str, str]],
    openings: Mapping[str, float],
    sentences: Mapping[str, float],
    stop: float,
    siding: float,
) -> ReviewGrammar:
    """Turn readable tables into a `ReviewGrammar`.

    Args:
        words: class -> its words, from the most to the least frequent.
        opinions: class -> its words of praise and its words of blame.
        openings: template -> weight; exactly one opens a review, and no review ends with it.
        sentences: template -> weight; one or more follow.
        stop: probability that the review ends after a sentence.
        siding: probability that an opinion word sides with the label.
    """
    states, transition, end = _automaton(_chains(openings), _chains(sentences), stop)
    lexicon = _Lexicon(words, opinions, siding)
    emitted = [lexicon.distribution(slot) for slot in states[1:]]
    vocabulary = list(dict.fromkeys(word for by_label in emitted for word in by_label[0]))
    return ReviewGrammar(vocabulary, states, transition, _emission(emitted, vocabulary), end)


_Chain = tuple[list[str], float]  # the slots of a sentence and the probability of this sentence form


def _automaton(
    openings: Sequence[_Chain], sentences: Sequence[_Chain], stop: float
) -> tuple[list[str], np.ndarray, np.ndarray]:
    """States (slot names), transitions [S, S] and ends [S]: the start, the openings' slots, the sentences' slots."""
    states = ["", *(slot.rstrip("?") for slots, _ in (*openings, *sentences) for slot in slots)]
    transition, end = np.zeros((len(states), len(states))), np.zeros(len(states))
    opening, opening_ends = _lay(openings, 1, transition)
    sentence, sentence_ends = _lay(sentences, opening_ends[-1] + 1, transition)
    transition[0], transition[opening_ends + sentence_ends] = opening, sentence
    end[sentence_ends] = stop
    return states, transition, end


def _lay(chains: Sequence[_Chain], first: int, transition: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Write the steps within the chains into `transition`, from state `first` on; return the entry [S] and the ends."""
    entry, ends = np.zeros(len(transition)), []
    for slots, weight in chains:
        for slot, probability in _followers(slots, -1):
            entry[first + slot] += weight * probability
        for i in range(len(slots)):
            for slot, probability in _followers(slots, i):
                transition[first + i, first + slot] = probability
        first += len(slots)
        ends.append(first - 1)
    return entry, ends


def _chains(templates: Mapping[str, float]) -> list[_Chain]:
    """Every template in every form its agreement marks allow, as slots and a probability; they sum to 1."""
    total = sum(templates.values())
    return [
        (slots, weight / total * share) for template, weight in templates.items() for slots, share in _forms(template)
    ]


def _forms(template: str) -> Iterator[tuple[list[str], float]]:
    """`"DETERMINER# NOUN#"` becomes `["DETERMINER.one", "NOUN.one"]` and `["DETERMINER.many", "NOUN.many"]`."""
    marks = [mark for mark in AGREEMENTS if mark in template]
    for forms in itertools.product(*(AGREEMENTS[mark].items() for mark in marks)):
        form, share = template, 1.0
        for mark, (name, probability) in zip(marks, forms, strict=True):
            form, share = form.replace(mark, f".{name}"), share * probability
        yield form.split(), share


def _followers(slots: Sequence[str], i: int) -> Iterator[tuple[int, float]]:
    """The slots that may come after slot `i`, each with its probability: optional ones can be passed over."""
    reach = 1.0
    for j in range(i + 1, len(slots)):
        optional = slots[j].endswith("?")
        yield j, reach * (OPTIONAL if optional else 1)
        if not optional:
            return
        reach *= 1 - OPTIONAL


@dataclass(frozen=True)
class _Lexicon:
    """What a slot can say: a distribution over words for each label."""

    words: Mapping[str, str]
    opinions: Mapping[str, tuple[str, str]]
    siding: float

    def distribution(self, slot: str) -> tuple[dict[str, float], dict[str, float]]:
        """Word -> probability, for label 0 and for label 1; both have the same words in the same order."""
        if slot in self.opinions:
            praise, blame = (_falling(words.split()) for words in self.opinions[slot])
            return _mix([(1 - self.siding, praise), (self.siding, blame)]), _mix(
                [(self.siding, praise), (1 - self.siding, blame)]
            )
        if slot in self.words:
            return (_falling(self.words[slot].split()),) * 2
        if slot.islower() or not slot.isalpha():
            return ({slot: 1.0},) * 2
        return self._all_forms(slot)

    def _all_forms(self, slot: str) -> tuple[dict[str, float], dict[str, float]]:
        """The mixture of a class's forms, by the probabilities of the forms."""
        forms = [
            (share, self.distribution(f"{slot}.{form}"))
            for agreement in AGREEMENTS.values()
            for form, share in agreement.items()
            if f"{slot}.{form}" in {*self.words, *self.opinions}
        ]
        if not forms:
            raise KeyError(f"no words are given for the class {slot}")
        return _mix([(share, form[0]) for share, form in forms]), _mix([(share, form[1]) for share, form in forms])


def _falling(words: Sequence[str]) -> dict[str, float]:
    """Probabilities that fall with the rank as Zipf's law does, but gently: proportional to 1 / (rank + 3)."""
    weights = {word: 1 / (rank + 3) for rank, word in enumerate(words)}
    return {word: weight / sum(weights.values()) for word, weight in weights.items()}


def _mix(parts: Sequence[tuple[float, Mapping[str, float]]]) -> dict[str, float]:
    mixture: dict[str, float] = {}
    for share, distribution in parts:
        for word, probability in distribution.items():
            mixture[word] = mixture.get(word, 0.0) + share * probability
    return mixture


def _emission(emitted: Sequence[tuple[Mapping[str, float], ...]], vocabulary: Sequence[str]) -> np.ndarray:
    """Emission probabilities [2, S, V]; row 0 of the states, the start, stays empty."""
    emission = np.zeros((2, len(emitted) + 1, len(vocabulary)))
    column = {word: i for i, word in enumerate(vocabulary)}
    for state, by_label in enumerate(emitted, start=1):
        for label, distribution in enumerate(by_label):
            emission[label, state, [column[word] for word in distribution]] = list(distribution.values())
    return emission


def _cumulative(probabilities: np.ndarray) -> np.ndarray:
    """Cumulative sums along the last axis whose last value is exactly 1; rows of zeros stay zeros."""
    sums = probabilities.cumsum(-1)
    return sums / np.where(sums[..., -1:] > 0, sums[..., -1:], 1)


def _draw(cumulative: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """One index [N] a row of cumulative probabilities [N, K]; never one whose probability is zero."""
    return (cumulative <= rng.random((len(cumulative), 1))).sum(-1)


def toy_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """One token a word, with `<pad>`, `<eos>` and `<unk>` as ids 0, 1, 2; pads at the left, as sampling wants."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,  # otherwise "wonderful ." would come back as "wonderful."
    )
