// This file starts the proxy under test: the built binary on a free loopback port, with a new data directory, one project
// with an OpenAI and an Anthropic provider, and tokens created through /manage.
import assert from 'node:assert/strict';
import { execFileSync, spawn } from 'node:child_process';
import { randomBytes } from 'node:crypto';
import { once } from 'node:events';
import { mkdtempSync, rmSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { fileURLToPath } from 'node:url';
import { Provider } from './provider.mjs';

export const promptCanary = 'prompt-canary-4Xk9vB';

export class Proxy {
  #secrets = [promptCanary];
  #log = [];

  static async start() {
    const p = new Proxy();
    await p.start();
    return p;
  }

  async start() {
    this.dir = mkdtempSync(join(tmpdir(), 'llm-proxy-e2e-'));
    this.provider = await Provider.start();
    this.managementToken = randomBytes(32).toString('hex');
    this.#secrets.push(this.managementToken, this.provider.openaiKey, this.provider.anthropicKey);
    await this.#run();
    const project = await this.manage('POST', '/manage/projects', { name: 'e2e', openai_api_key: this.provider.openaiKey });
    this.project = project.id;
    await this.manage('POST', `/manage/projects/${this.project}/upstreams`, {
      name: 'claude', provider: 'anthropic', base_url: this.provider.url, api_key: this.provider.anthropicKey,
    });
    this.token = await this.newToken();
  }

  async #run() {
    this.process = spawn(binary(this.dir), [], {
      env: {
        LISTEN_ADDR: '127.0.0.1:0', DATA_DIR: join(this.dir, 'data'), MANAGEMENT_TOKEN: this.managementToken,
        OPENAI_API_URL: this.provider.url, ALLOW_PRIVATE_UPSTREAMS: 'true', LOG_LEVEL: 'debug', DRAIN_TIMEOUT: '5s', DRAIN_DELAY: '0s',
      },
      stdio: ['ignore', 'pipe', 'pipe'],
    });
    createInterface({ input: this.process.stdout }).on('line', (line) => this.#log.push(line));
    const log = createInterface({ input: this.process.stderr });
    this.url = await new Promise((resolve, reject) => {
      this.process.once('exit', (code) => reject(new Error(`the proxy ended with ${code}: ${this.#log.join('\n')}`)));
      log.on('line', (line) => {
        this.#log.push(line);
        if (line.includes('"msg":"listening"')) resolve(`http://${JSON.parse(line).address}`);
      });
    });
  }

  async manage(method, path, body) {
    const res = await fetch(this.url + path, {
      method,
      headers: { authorization: `Bearer ${this.managementToken}`, 'content-type': 'application/json' },
      body: body && JSON.stringify(body),
    });
    const text = await res.text();
    assert.ok(res.ok, `${method} ${path}: ${res.status} ${text}`);
    return JSON.parse(text);
  }

  async newToken(fields = {}) {
    const { token } = await this.manage('POST', '/manage/tokens', { project_id: this.project, name: 'e2e', ...fields });
    this.#secrets.push(token);
    return token;
  }

  // call makes a chat call. members are added to its body.
  call(token, members = {}, headers = {}) {
    return fetch(`${this.url}/v1/chat/completions`, {
      method: 'POST',
      headers: { authorization: `Bearer ${token}`, 'content-type': 'application/json', ...headers },
      body: JSON.stringify({ model: 'gpt-4o-mini', messages: [{ role: 'user', content: 'Hello' }], ...members }),
    });
  }

  // settled waits until the last call is settled, and returns its row.
  async settled() {
    for (;;) {
      const { data } = await this.manage('GET', '/manage/requests?limit=1');
      if (data[0] && data[0].outcome !== 'open') return data[0];
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }

  // stop ends the proxy as an operator would. It must end cleanly, and its log must contain no secret and no prompt.
  async stop() {
    this.process.kill('SIGTERM');
    const [code] = await once(this.process, 'close');
    this.provider.close();
    rmSync(this.dir, { recursive: true });
    assert.equal(code, 0, this.#log.slice(-5).join('\n'));
    for (const secret of this.#secrets) assert.ok(!this.#log.some((line) => line.includes(secret)), 'the log holds a secret');
  }
}

// binary returns the program: LLM_PROXY_BINARY, or one built for this run.
export function binary(dir) {
  if (process.env.LLM_PROXY_BINARY) return process.env.LLM_PROXY_BINARY;
  const file = join(dir, 'llm-proxy');
  execFileSync('go', ['build', '-trimpath', '-o', file, '.'], {
    cwd: fileURLToPath(new URL('..', import.meta.url)), env: { ...process.env, CGO_ENABLED: '0' }, stdio: 'inherit',
  });
  return file;
}

// within rejects unless the promise resolves in time. Its clock stands still while a busy machine keeps this process waiting: it
// counts steps of 10 ms, however late they are.
export async function within(ms, promise, what) {
  let timer, steps = ms / 10;
  const late = new Promise((_, reject) => {
    timer = setInterval(() => { if (--steps < 0) reject(new Error(`not within ${ms} ms: ${what}`)); }, 10);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearInterval(timer);
  }
}

// countingFetch is fetch with a counter of the requests that an SDK sends.
export function countingFetch() {
  const counting = (...args) => {
    counting.count++;
    return fetch(...args);
  };
  counting.count = 0;
  return counting;
}

// A Demo is a running `llm-proxy demo`.
export class Demo {
  static async start(env = {}) {
    const d = new Demo();
    await d.start(env);
    return d;
  }

  async start(env = {}) {
    this.dir = mkdtempSync(join(tmpdir(), 'llm-proxy-demo-'));
    this.process = spawn(binary(this.dir), ['demo'], { env: { LISTEN_ADDR: '127.0.0.1:0', TMPDIR: this.dir, PATH: process.env.PATH, ...env } });
    let guide = '';
    for (const stream of [this.process.stdout, this.process.stderr]) stream.on('data', (data) => { guide += data; });
    const find = (pattern) => guide.match(pattern)?.[1];
    while (!guide.includes('Ctrl-C ends the demo')) {
      if (this.process.exitCode !== null) throw new Error(`the demo ended: ${guide}`);
      await new Promise((resolve) => setTimeout(resolve, 20));
    }
    [this.url, this.token, this.managementToken] = [find(/base URL +(\S+)\/v1/), find(/token +(sk-llmp_\w+)/), find(/management key +(llmpm_\w+)/)];
  }

  async manage(path) {
    return (await fetch(this.url + path, { headers: { authorization: `Bearer ${this.managementToken}` } })).json();
  }

  // calls waits until all calls since a time are settled, and returns them, newest first.
  async calls(since) {
    for (;;) {
      const res = await fetch(`${this.url}/manage/requests?limit=50&from=${since}`, { headers: { authorization: `Bearer ${this.managementToken}` } });
      const { data } = await res.json();
      if (data.every((row) => row.outcome !== 'open')) return data;
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
  }

  async stop() {
    this.process.kill('SIGTERM');
    if (this.process.exitCode === null) await once(this.process, 'close');
    rmSync(this.dir, { recursive: true, force: true });
  }
}
