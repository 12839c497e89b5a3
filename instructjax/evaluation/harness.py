"""Models of this library in EleutherAI's lm-evaluation-harness, on a mesh.

`HarnessLM` answers the harness's three kinds of requests. Text becomes tokens, and tokens beyond
the context are cut, as in the harness's own `hf` model. Needs `pip install 'instructjax[eval]'`;
nothing else in the library imports this module. `python -m instructjax.evaluation` runs tasks.
"""

import collections
import functools
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jinja2
import numpy as np
from jax.sharding import Mesh
from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    has_bos_prefix,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from instructjax import models, rollout, sampler, sharding
from instructjax.models import ModelConfig, Params, Shard
from instructjax.train import Batch

# A text is scored as (tokens that are given, tokens that are scored).
Pair = tuple[tuple[int, ...], tuple[int, ...]]

MAX_NEW_TOKENS = 256  # of a task that gives none, as in the `hf` model
SETTINGS = ("do_sample", "temperature", "top_k", "top_p")  # of a task's generation_kwargs


class HarnessLM(TemplateLM):
    """A language model for `lm_eval.simple_evaluate(model=...)`.

    Results do not depend on the order of the requests. Several hosts hold all requests each, and
    share the work of a batch.

    Args:
      config, params: of a language model, laid out on the mesh.
      tokenizer: of `transformers`.
      mesh: batches are split over data x fsdp, the model over tensor.
      batch_size: rows that are scored at a time, and prompts that are answered at a time; a
        multiple of data x fsdp.
      seed: of the noise for tasks that sample.

    Raises:
      ValueError: the tokenizer has neither a BOS nor an EOS token.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: Any,
        mesh: Mesh,
        *,
        batch_size: int = 16,
        seed: int = 0,
    ):
        super().__init__()
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise ValueError("the tokenizer has neither a BOS nor an EOS token")
        self.config, self.params, self.tokenizer, self.mesh = config, params, tokenizer, mesh
        self.batch_size, self._key = batch_size, jax.random.key(seed)
        score = functools.partial(_score, config=config, shard=sharding.constrainer(mesh))
        self._score = jax.jit(score, out_shardings=sharding.replicated(mesh))

    # ------------------------------------------------------------------------- text and tokens

    @property
    def eot_token_id(self) -> int:
        """EOS."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that nothing precedes: BOS, or EOS where there is none."""
        bos = self.tokenizer.bos_token_id
        return self.tokenizer.eos_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        """The model's context, in tokens."""
        return self.config.max_length

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids of a text. A tokenizer that adds BOS adds none to a text that begins with it.

        Args:
          add_special_tokens: None: as the tokenizer does by default.
        """
        if add_special_tokens is None:
            begins = has_bos_prefix(string, self.tokenizer.decode([self.prefix_token_id]))
            add_special_tokens = not begins
        return self.tokenizer.encode(string, add_special_tokens=add_special_tokens)

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in the harness's cache of requests."""
        return self.tokenizer.name_or_path.replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text, by the tokenizer's chat template.

        A template that refuses the conversation gets it without its system message, as in the `hf`
        model.

        Args:
          chat_history: messages of `role` and `content`.
          add_generation_prompt: whether an assistant's turn is opened. Otherwise the last message
            is left open, to be continued.
        """
        render = functools.partial(
            self.tokenizer.apply_chat_template,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        try:
            return render(chat_history)
        except jinja2.TemplateError:
            return render([message for message in chat_history if message["role"] != "system"])

    # ------------------------------------------------------------------------- log-likelihoods

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in nats. Each token is scored once.

        A text longer than the context is cut into windows; the last one is given as many tokens as
        fit before those that it scores.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for (text,) in (request.args for request in requests):
            cut = utils.get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
            )
            parts = [(None, *utils.make_disjoint_window(window)) for window in cut]
            windows += parts
            counts.append(len(parts))
        values = iter(self._loglikelihood_tokens(windows, disable_tqdm))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(values)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, whether each token is the likeliest) of continuations.

        Args:
          requests: (its key in the harness's cache or None, context, continuation), in tokens.

        Raises:
          ValueError: a continuation is empty or longer than the model's context.
        """
        pairs: list[Pair] = []
        for _, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens: must be at least 1, and at most"
                    f" the model's context of {self.max_length}"
                )
            # The last token is scored and not run, so that max_length + 1 tokens fit.
            room = self.max_length + 1 - len(continuation)
            pairs.append((tuple(context[-room:]), tuple(continuation)))

        found: dict[Pair, tuple[float, bool]] = {}
        with self._progress("log-likelihoods", len(set(pairs)), disable_tqdm) as bar:
            for part, rows in batches(set(pairs), self.batch_size, self.max_length):
                scored = self._score(self.params, rollout.put(rows, self.mesh))
                logp_BR, greedy_BR = map(np.asarray, scored)
                logp_BR = np.where(rows["mask_BR"], logp_BR, 0).astype(np.float64)
                greedy_B = np.all(greedy_BR | ~rows["mask_BR"], axis=1)
                results = zip(logp_BR.sum(1).tolist(), greedy_B.tolist(), strict=True)
                found |= zip(part, results, strict=False)  # the last rows may be filler
                bar.update(len(part))
        results = [found[pair] for pair in pairs]
        for (key, *_), result in zip(requests, results, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    # ------------------------------------------------------------------------- generation

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Responses, greedy unless the task samples, without the stop string and what follows it.

        Raises:
          ValueError: a task asks for what the sampler does not do, or for as many new tokens as the
            context has.
        """
        calls: list[Any] = [request.args for request in requests]  # (context, generation_kwargs)
        groups: dict[str, list[int]] = collections.defaultdict(list)
        for i, (_, kwargs) in enumerate(calls):
            groups[json.dumps(kwargs, sort_keys=True)].append(i)
        texts: list[str] = [""] * len(requests)
        with self._progress("responses", len(requests), disable_tqdm) as bar:
            for indices in groups.values():
                contexts, kwargs = [calls[i][0] for i in indices], calls[indices[0]][1]
                for n, text in self._generate(contexts, kwargs):
                    texts[indices[n]] = text
                    self.cache_hook.add_partial("generate_until", (contexts[n], kwargs), text)
                    bar.update()
        return texts

    def _generate(
        self, contexts: Sequence[str], kwargs: dict[str, Any]
    ) -> Iterator[tuple[int, str]]:
        """Yields (index of the context, response)."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(kwargs, MAX_NEW_TOKENS))
        until = handle_stop_sequences(settings.pop("until"), eos=self.tokenizer.eos_token)
        eos_ids = self._ends(until)
        new = settings.pop("max_gen_toks")
        room = self.max_length - new
        if room < 1:
            raise ValueError(
                f"generation_kwargs: {new} new tokens leave no room for a prompt in the model's"
                f" context of {self.max_length}; the task needs a smaller max_gen_toks"
            )
        if unknown := sorted(set(settings) - {*SETTINGS}):
            raise ValueError(f"generation_kwargs: {', '.join(unknown)}: the sampler has no such")
        if not settings.pop("do_sample"):
            settings = {"temperature": 0.0}

        prompts = [self.tok_encode(text)[-room:] or [self.prefix_token_id] for text in contexts]
        # The noise of a response depends on its context, and on how often that came before.
        seen: collections.Counter[str] = collections.Counter()
        numbers = []
        for text in contexts:
            numbers.append(zlib.crc32(f"{seen[text]} {text}".encode()) & 0x7FFFFFFF)
            seen[text] += 1
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i], numbers[i]))
        size = min(self.batch_size, len(order))
        widths = sampler.buckets([len(prompt) for prompt in prompts], longest=room)
        for start in range(0, len(order), size):
            part = order[start : start + size]
            filled = part + part[:1] * (size - len(part))  # one size, one program
            tokens, _ = rollout.sample(
                self.params,
                self.config,
                [prompts[i] for i in filled],
                self._key,
                indices=[numbers[i] for i in filled],
                max_new_tokens=new,
                eos_ids=eos_ids,
                widths=widths,
                mesh=self.mesh,
                **settings,
            )
            ids = rollout.token_ids(tokens)[: len(part)]
            decoded = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
            for i, text in zip(part, decoded, strict=True):
                yield i, postprocess_generated_text(text, until, think_end_token=None)

    def _ends(self, until: Sequence[str]) -> tuple[int, ...]:
        """The ids that end a response: the model's, and the tokens that hold a stop string.

        A stop string that spans tokens ends nothing here. It is cut afterwards, with what follows.
        """
        # A token of some bytes of a character is a replacement character only when it is alone.
        stops = [stop for stop in until if stop and "\ufffd" not in stop]
        holding = [i for i, text in enumerate(self._texts) if any(stop in text for stop in stops)]
        return tuple(dict.fromkeys([*self.config.eos_ids, *holding]))

    @functools.cached_property
    def _texts(self) -> list[str]:
        """The text of each token alone."""
        count = min(len(self.tokenizer), self.config.vocab_size)
        return self.tokenizer.batch_decode([[i] for i in range(count)])

    def _progress(self, what: str, total: int, disable: bool) -> Any:
        return tqdm(total=total, desc=what, disable=disable or jax.process_index() != 0)


def batches(
    pairs: set[Pair], size: int, longest: int
) -> Iterator[tuple[list[Pair], dict[str, np.ndarray]]]:
    """Pairs as batches of like length. The same pairs give the same batches, in any order.

    Args:
      size: rows of a batch; the last is filled with rows whose mask is empty.
      longest: tokens that a row may have, without its last one.

    Yields:
      (pairs; tokens_BT, at_BR, targets_BR, mask_BR). Target r is predicted at column at[r] of
      tokens, which end before the last target. T and R are each one of a few widths.
    """
    if not pairs:
        return

    def columns(pair: Pair) -> int:
        return len(pair[0]) + len(pair[1]) - 1

    order = sorted(pairs, key=lambda pair: (columns(pair), len(pair[1]), pair))
    widths_T = sampler.buckets([columns(pair) for pair in order], longest=longest)
    widths_R = sampler.buckets([len(pair[1]) for pair in order], most=3, multiple=8)
    for start in range(0, len(order), size):
        part = order[start : start + size]
        T = next(width for width in widths_T if width >= columns(part[-1]))
        R = next(width for width in widths_R if width >= max(len(pair[1]) for pair in part))
        rows = {name: np.zeros((size, R), np.int32) for name in ("at_BR", "targets_BR")}
        rows["mask_BR"] = np.zeros((size, R), bool)
        rows["tokens_BT"] = np.zeros((size, T), np.int32)
        for b, (context, continuation) in enumerate(part):
            n = len(continuation)
            rows["tokens_BT"][b, : len(context) + n - 1] = (context + continuation)[:-1]
            rows["at_BR"][b, :n] = np.arange(len(context) - 1, len(context) + n - 1)
            rows["targets_BR"][b, :n] = continuation
            rows["mask_BR"][b, :n] = True
        yield part, rows


def _score(
    params: Params, rows: Batch, *, config: ModelConfig, shard: Shard
) -> tuple[jax.Array, jax.Array]:
    """(log-probability, whether it is the likeliest) of targets_BR; see `batches`."""
    # Padding is on the right, where no token that counts sees it.
    hidden_BRD = models.apply(params, config, rows["tokens_BT"], at=rows["at_BR"], shard=shard)
    unembed_VD = models.unembedding(params)
    return models.token_logp(
        hidden_BRD, unembed_VD, rows["targets_BR"], config, greedy=True, shard=shard
    )
