"""An HTTP client for servers of other people: whatever they send has an end, in bytes and in time."""

import re

import aiohttp

from scq.data.pace import LARGEST_MANIFEST, PATIENCE, Pace


class _Bounded(aiohttp.ClientResponse):
    async def read(self) -> bytes:
        """The body, or one byte more than was asked for: whoever gets that knows that there is more."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.request_info.headers.get("Range", ""))
        pace = Pace(int(asked[2]) - int(asked[1]) + 1 if asked else LARGEST_MANIFEST)
        body = bytearray()
        try:
            async for piece in self.content.iter_any():
                body += piece
                if pace.add(len(piece)):
                    self.close()
                    break
        except BaseException:
            self.close()
            raise
        return bytes(body[: pace.most + 1])


async def get_client(**options: object) -> aiohttp.ClientSession:
    """The session that fsspec reads with. A large file may take hours, as long as something arrives."""
    patience = aiohttp.ClientTimeout(total=None, sock_connect=PATIENCE, sock_read=PATIENCE)
    return aiohttp.ClientSession(**{"timeout": patience, **options}, response_class=_Bounded)  # type: ignore[arg-type]
