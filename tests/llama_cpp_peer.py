"""llama.cpp on exported files, through llama-cpp-python: tokens, logits, greedy answers, and what its tower makes.

Only where `llama_cpp` is installed (its build from source takes half an hour); whoever imports this skips without.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class Peer:
    """A text model and, where given, its mmproj; float32 throughout, so that nothing but the files decides."""

    def __init__(self, folder: Path, type: str = "f32") -> None:
        import llama_cpp
        from llama_cpp import mtmd_cpp

        self._api, self._mtmd = llama_cpp, mtmd_cpp
        self.llama = llama_cpp.Llama(
            model_path=str(folder / f"model-{type}.gguf"),
            n_ctx=1024,
            n_batch=512,
            n_threads=1,
            n_threads_batch=1,
            logits_all=True,
            type_k=llama_cpp.GGML_TYPE_F32,
            type_v=llama_cpp.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )
        settings = mtmd_cpp.mtmd_context_params_default()
        settings.use_gpu, settings.print_timings, settings.n_threads, settings.warmup = False, False, 1, False
        file = str(folder / f"mmproj-{type}.gguf").encode()
        self._pictures = mtmd_cpp.mtmd_init_from_file(file, self.llama.model, settings)
        assert self._pictures is not None, file

    def close(self) -> None:
        self._mtmd.mtmd_free(self._pictures)
        self.llama.close()

    @property
    def template(self) -> str:
        return str(self.llama.metadata["tokenizer.chat_template"])

    def encode(self, text: str, special: bool = False) -> list[int]:
        return list(self.llama.tokenize(text.encode(), add_bos=False, special=special))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """[L, V]."""
        self.llama.reset()
        self.llama.eval(list(ids))
        return np.array(self.llama.scores[: len(ids)])

    def greedy(self, ids: Sequence[int], count: int) -> list[int]:
        self.llama.reset()
        self.llama.eval(list(ids))
        return self._continue(len(ids), count)

    def _continue(self, past: int, count: int, unsaid: Sequence[int] = ()) -> list[int]:
        """Greedy tokens up to one that llama.cpp itself takes for an end, none of `unsaid`."""
        found: list[int] = []
        vocab = self._api.llama_model_get_vocab(self.llama.model)
        size = self.llama.n_vocab()
        while len(found) < count:
            row = self._api.llama_get_logits_ith(self.llama.ctx, -1)
            logits = np.array(np.ctypeslib.as_array(row, (size,)))
            logits[list(unsaid)] = -np.inf
            token = int(logits.argmax())
            if self._api.llama_vocab_is_eog(vocab, token):
                break
            found.append(token)
            batch = self._api.llama_batch_get_one((ctypes.c_int32 * 1)(token), 1)
            assert self._api.llama_decode(self.llama.ctx, batch) == 0
            past += 1
        return found

    def _chunks(self, prompt: str, pictures: Sequence[np.ndarray]) -> Any:
        """A prompt with <__media__> marks, and its pictures uint8 [H, W, 3]."""
        api = self._mtmd
        bitmaps = []
        for pixels in pictures:
            held = np.ascontiguousarray(pixels)
            data = held.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
            bitmaps.append(api.mtmd_bitmap_init(held.shape[1], held.shape[0], data))
        text = api.mtmd_input_text()
        encoded = prompt.encode()
        text.text, text.text_len, text.add_special, text.parse_special = encoded, len(encoded), False, True
        chunks = api.mtmd_input_chunks_init()
        array = (api.mtmd_bitmap_p_ctypes * len(bitmaps))(*bitmaps)
        assert api.mtmd_tokenize(self._pictures, chunks, ctypes.byref(text), array, len(bitmaps)) == 0
        return chunks

    def features(self, pixels: np.ndarray) -> np.ndarray:
        """Projected features of one picture [P, D]."""
        api = self._mtmd
        chunks = self._chunks("<__media__>", [pixels])
        found = [api.mtmd_input_chunks_get(chunks, n) for n in range(api.mtmd_input_chunks_size(chunks))]
        chunk = next(c for c in found if api.mtmd_input_chunk_get_type(c) == api.MTMD_INPUT_CHUNK_TYPE_IMAGE)
        assert api.mtmd_encode_chunk(self._pictures, chunk) == 0
        shape = api.mtmd_input_chunk_get_n_tokens(chunk), self.llama.n_embd()
        return np.array(np.ctypeslib.as_array(api.mtmd_get_output_embd(self._pictures), shape))

    def answer(self, prompt: str, pictures: Sequence[np.ndarray], count: int, unsaid: Sequence[int] = ()) -> list[int]:
        """The greedy answer to a prompt with pictures; `unsaid` ids are left out, as a client's logit bias does."""
        api, past = self._mtmd, self._api.llama_pos(0)
        self._api.llama_memory_clear(self._api.llama_get_memory(self.llama.ctx), True)
        chunks = self._chunks(prompt, pictures)
        ended = api.mtmd_helper_eval_chunks(self._pictures, self.llama.ctx, chunks, 0, 0, 512, True, ctypes.byref(past))
        assert ended == 0
        return self._continue(past.value, count, unsaid)
