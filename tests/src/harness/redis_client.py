"""A Python program that uses Redis: one connection, no retries, and a model of what the server should hold.

Every answer is compared with the model; an exception or a wrong answer ends the program with exit status 1 and a
message. It works until its standard input ends, then reads everything back and prints one JSON object. A line on
standard input marks the moment: how much was done before it is part of the report.
"""

import json
import random
import sys
import threading
import time

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

KEYS = 2000


class Program:
    def __init__(self, host, port, seed):
        self.choice = random.Random(seed)
        self.model = {}
        self.count = 0
        self.operations = 0
        self.at_mark = None
        self.stall = 0.0
        # A pool of one: commands and pipelines alike go over the same connection.
        pool = redis.ConnectionPool(
            host=host,
            port=port,
            max_connections=1,
            retry=Retry(NoBackoff(), 0),
            retry_on_timeout=False,
            socket_timeout=20,
        )
        self.client = redis.Redis(connection_pool=pool)

    def call(self, expected, method, *arguments, **options):
        began = time.monotonic()
        found = method(*arguments, **options)
        self.stall = max(self.stall, time.monotonic() - began)
        if found != expected:
            raise AssertionError(f"{method} {str(arguments)[:80]}: expected {expected!r:.80}, found {found!r:.80}")
        self.operations += 1

    def key(self):
        return b"py:%d" % self.choice.randrange(KEYS)

    def value(self, longest=200):
        return self.choice.randbytes(self.choice.randrange(longest + 1))

    def set(self):
        key, value = self.key(), self.value()
        self.model[key] = value
        self.call(True, self.client.set, key, value)

    def get(self):
        key = self.key()
        self.call(self.model.get(key), self.client.get, key)

    def incr(self):
        self.count += 1
        self.call(self.count, self.client.incr, "py-count")

    def append(self):
        key, value = self.key(), self.value(20)
        self.model[key] = self.model.get(key, b"") + value
        self.call(len(self.model[key]), self.client.append, key, value)

    def delete(self):
        key = self.key()
        self.call(int(self.model.pop(key, None) is not None), self.client.delete, key)

    def many(self):
        pairs = {self.key(): self.value() for _ in range(10)}
        self.model.update(pairs)
        self.call(True, self.client.mset, pairs)
        keys = [self.key() for _ in range(10)]
        self.call([self.model.get(key) for key in keys], self.client.mget, keys)

    def pipeline(self):
        with self.client.pipeline(transaction=self.choice.random() < 0.5) as pipe:
            expected = []
            for _ in range(20):
                self.count += 1
                key, value = self.key(), self.value()
                self.model[key] = value
                pipe.incr("py-count").set(key, value)
                expected += [self.count, True]
            self.call(expected, pipe.execute)

    def large(self):
        key, value = self.key(), self.value(1 << 18)
        self.model[key] = value
        self.call(True, self.client.set, key, value)
        self.call(value, self.client.get, key)

    def step(self):
        usual = [self.set, self.get, self.incr, self.append, self.delete]
        rare = [self.many, self.pipeline]
        draw = self.choice.random()
        self.choice.choice(usual if draw < 0.96 else rare if draw < 0.998 else [self.large])()

    def check(self):
        self.call(self.count, lambda: int(self.client.get("py-count") or 0))
        for number in range(KEYS):
            key = b"py:%d" % number
            self.call(self.model.get(key), self.client.get, key)


def main():
    host, port, seed = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    program = Program(host, port, seed)
    connection = program.client.client_id()
    print("ready", flush=True)
    ended = threading.Event()

    def listen():
        for _ in sys.stdin:
            program.at_mark = program.operations
        ended.set()

    threading.Thread(target=listen, daemon=True).start()
    while not ended.is_set():
        program.step()
    worked = program.operations
    program.check()
    if program.client.client_id() != connection:
        raise AssertionError("the client connected again")
    report = {
        "library": redis.__version__,
        "operations": worked,
        "at_mark": program.at_mark,
        "keys": len(program.model) + (program.count > 0),
        "stall_ms": program.stall * 1000,
    }
    print(json.dumps(report), flush=True)


main()
