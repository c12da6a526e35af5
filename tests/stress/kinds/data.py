"""Images, shards, token caches, corpora and tokenizers."""

from __future__ import annotations

import io
import os
import random
import shutil
import tarfile
from pathlib import Path

from tests.stress.kinds.base import Case, Kind
from tests.stress.mutations import damaged
from tests.stress.worker import Wrong


class Images(Kind):
    """Image files of every format that is read."""

    name = "images"
    weight = 7.0

    @classmethod
    def prepare(cls, folder: Path) -> None:
        from PIL import Image

        picture = Image.effect_mandelbrot((48, 32), (-2, -1.5, 1, 1.5), 30)
        for mode, suffixes in {"RGB": "jpg png webp bmp ppm tiff gif", "RGBA": "png webp", "L": "png jpg"}.items():
            for suffix in suffixes.split():
                picture.convert(mode).save(folder / f"{mode}.{suffix}")
        picture.convert("I;16").save(folder / "I16.png")
        picture.convert("CMYK").save(folder / "CMYK.jpg")
        picture.convert("P").save(folder / "P.gif")
        picture.convert("RGB").save(folder / "lzw.tiff", compression="tiff_lzw")

    def case(self, rng: random.Random, folder: Path) -> Case:
        good = rng.choice(sorted(self.corpus.iterdir()))
        path = folder / good.name
        what = good.name
        if rng.random() < 0.02:
            os.mkfifo(path)
            what = "FIFO"
        elif rng.random() < 0.05:
            path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n%%EOF\n")
            what = "EPS"
        else:
            path.write_bytes(damaged(rng, good.read_bytes()))

        def read() -> str:
            from gatewise.data.images.reading import read_image

            image = read_image(path)
            if image.mode != "RGB":
                raise Wrong(f"mode {image.mode}")
            return "changed"

        return Case(what, read)


class Shards(Kind):
    """Tar files of samples."""

    name = "shards"
    weight = 5.0
    SAMPLES = 20

    @classmethod
    def prepare(cls, folder: Path) -> None:
        from PIL import Image

        for suffix, mode in (("tar", "w"), ("tar.gz", "w:gz")):
            with tarfile.open(folder / f"shard.{suffix}", mode) as tar:
                for number in range(cls.SAMPLES):
                    buffer = io.BytesIO()
                    Image.new("L", (8, 8), 10 * number).save(buffer, "PNG")
                    for extension, content in (("png", buffer.getvalue()), ("cls", str(number % 5).encode())):
                        member = tarfile.TarInfo(f"{number:04}.{extension}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))

    def case(self, rng: random.Random, folder: Path) -> Case:
        good = rng.choice(sorted(self.corpus.iterdir()))
        path = folder / good.name
        content = good.read_bytes()
        choice = rng.random()
        if choice < 0.4:
            changed = content[: rng.randrange(len(content))]
            # A cut within the empty blocks that pad the end of a tar file loses nothing.
            what = f"{good.name} cut to {len(changed)} of {len(content)} bytes"
        elif choice < 0.7 and good.suffix == ".tar":
            # Within a header: blocks of 512 bytes, header and content in turn.
            place = rng.randrange(2 * self.SAMPLES) * 1024 + rng.randrange(300)
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            changed, what = bytes(flipped), f"{good.name}, bit of a header at {place}"
        else:
            changed, what = damaged(rng, content), good.name
        path.write_bytes(changed)

        def read() -> str:
            from gatewise.data.images.shards import expand_shards, shard_samples

            [shard] = expand_shards(str(path))
            found = [(sample["__key__"], sorted(sample)) for sample in shard_samples(shard)]
            if len(found) < self.SAMPLES:
                raise Wrong(f"{len(found)} of {self.SAMPLES} samples, without a word")
            return "changed"

        return Case(what, read)


class TokenCaches(Kind):
    """The cached tokens of a corpus, its files and a tokenizer."""

    name = "token caches"
    weight = 4.0

    @classmethod
    def prepare(cls, folder: Path) -> None:
        import pyarrow
        import pyarrow.parquet
        from tokenizers import Tokenizer, models, pre_tokenizers, trainers

        texts = [f"document {number} says {'word ' * (number % 7)}and ends" for number in range(60)]
        (folder / "corpus").mkdir()
        for number in range(3):
            (folder / "corpus" / f"{number}.txt").write_text("\n".join(texts[number::3]), encoding="utf-8")
        pyarrow.parquet.write_table(pyarrow.table({"text": texts}), folder / "corpus" / "rows.parquet")
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
        trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<unk>", "<|endoftext|>"])
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.save(str(folder / "tokenizer.json"))

    def case(self, rng: random.Random, folder: Path) -> Case:
        shutil.copytree(self.corpus, folder / "text")
        names = rng.choice(("bytes", str(folder / "text" / "tokenizer.json")))
        whole = self._tokens(folder, names)
        place = rng.choice(("cache", "cache", "cache", "corpus", "tokenizer"))
        if place == "cache":
            candidates = [path for path in (folder / "cache").rglob("*") if path.is_file()]
        elif place == "corpus":
            candidates = sorted((folder / "text" / "corpus").iterdir())
        else:
            candidates = [folder / "text" / "tokenizer.json"]
            names = str(candidates[0])
        path = rng.choice(sorted(candidates))
        path.write_bytes(damaged(rng, path.read_bytes()))

        def read() -> str:
            found = self._tokens(folder, names)
            same = found == whole
            if place == "cache" and not same:
                raise Wrong(f"other tokens from a damaged {path.name}")
            return "same" if same else "changed"

        return Case(path.name, read)

    def _tokens(self, folder: Path, tokenizer: str) -> list[bytes]:
        from gatewise.data.text.text import Text

        data = Text(
            folder / "text" / "corpus",
            tokenizer=tokenizer,
            context=8,
            batch_size=4,
            cache_dir=folder / "cache",
            val_fraction=0.2,
            test_fraction=0.0,
        )
        data.prepare_data()
        data.setup()
        return [tokens.numpy().tobytes() for tokens, _ in data.val_dataloader()]
