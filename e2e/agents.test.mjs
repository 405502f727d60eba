// This file runs real coding agents against `llm-proxy demo`, headless and with the settings of docs/agents.md: a prompt in,
// an answer out, and each call on record. An agent that is not installed is skipped. To run all of them:
//   npm install --prefix DIR @anthropic-ai/claude-code @openai/codex opencode-ai, then LLM_PROXY_AGENTS=DIR node --test agents.test.mjs
import assert from 'node:assert/strict';
import { execFile, spawn } from 'node:child_process';
import { once } from 'node:events';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { binary } from './proxy.mjs';

const folder = join(process.env.LLM_PROXY_AGENTS ?? fileURLToPath(new URL('.', import.meta.url)), 'node_modules', '.bin');
const prompt = 'Say hello';

let demo, demoDir, url, key, token, dir;
before(async () => {
  demoDir = mkdtempSync(join(tmpdir(), 'llm-proxy-demo-'));
  demo = spawn(binary(demoDir), ['demo'], { env: { LISTEN_ADDR: '127.0.0.1:0', TMPDIR: demoDir, PATH: process.env.PATH } });
  let guide = '';
  for (const stream of [demo.stdout, demo.stderr]) stream.on('data', (data) => { guide += data; });
  const find = (pattern) => guide.match(pattern)?.[1];
  while (!guide.includes('Ctrl-C ends the demo')) {
    if (demo.exitCode !== null) throw new Error(`the demo ended: ${guide}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
  [url, token, key] = [find(/base URL +(\S+)\/v1/), find(/token +(sk-llmp_\w+)/), find(/management key +(llmpm_\w+)/)];
});
after(async () => {
  demo.kill('SIGTERM');
  if (demo.exitCode === null) await once(demo, 'close');
  rmSync(demoDir, { recursive: true, force: true });
});
beforeEach(() => { dir = mkdtempSync(join(tmpdir(), 'llm-proxy-agent-')); });

// write writes a settings file of an agent, in its home.
function write(name, contents) {
  mkdirSync(dirname(join(dir, name)), { recursive: true });
  writeFileSync(join(dir, name), contents);
}

// run runs an agent in an empty home and returns what it printed. It fails if the agent does.
function run(program, args, env) {
  return new Promise((resolve, reject) => {
    const child = execFile(join(folder, program), args, {
      cwd: dir, timeout: 50_000, killSignal: 'SIGKILL', env: { PATH: process.env.PATH, HOME: dir, NO_COLOR: '1', ...env },
    }, (error, stdout, stderr) => {
      rmSync(dir, { recursive: true, force: true, maxRetries: 3 });
      if (error) reject(new Error(`${program}: ${error.message}\n${stdout}\n${stderr}`));
      else resolve(stdout + stderr);
    });
    child.stdin.end();
  });
}

// agent declares the test of an agent. Its calls to the endpoint must be on record with exact usage.
function agent(name, program, endpoint, start) {
  const skip = existsSync(join(folder, program)) ? false : `${program} is not installed in ${folder}`;
  test(name, { skip, timeout: 58_000 }, async () => {
    const since = new Date().toISOString();
    const output = await start();
    assert.match(output, /demo provider knows/);
    const res = await fetch(`${url}/manage/requests?limit=50&from=${since}`, { headers: { authorization: `Bearer ${key}` } });
    const { data } = await res.json();
    const calls = data.filter((row) => row.endpoint === endpoint);
    assert.ok(calls.length > 0, JSON.stringify(data));
    for (const row of calls) {
      assert.equal(row.outcome, 'ok', JSON.stringify(row));
      assert.equal(row.usage_source, 'exact', JSON.stringify(row));
    }
  });
}

describe('coding agents', () => {
  agent('Claude Code', 'claude', 'POST /v1/messages', () => run('claude', ['-p', prompt, '--model', 'claude-sonnet-5'], {
    ANTHROPIC_BASE_URL: url, ANTHROPIC_AUTH_TOKEN: token, CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC: '1',
  }));

  agent('Codex, a provider of its own', 'codex', 'POST /v1/responses', () => {
    write('.codex/config.toml', `model = "gpt-5-mini"\nmodel_provider = "proxy"\n[model_providers.proxy]\nname = "proxy"\n`
      + `base_url = "${url}/v1"\nenv_key = "LLM_PROXY_TOKEN"\nwire_api = "responses"\n`);
    return run('codex', ['exec', '--skip-git-repo-check', prompt], { LLM_PROXY_TOKEN: token });
  });

  agent('Codex, the built-in provider', 'codex', 'POST /v1/responses', () => {
    write('.codex/config.toml', `model = "gpt-5-mini"\nopenai_base_url = "${url}/v1"\n`);
    return run('codex', ['exec', '--skip-git-repo-check', prompt], { OPENAI_API_KEY: token, CODEX_API_KEY: token });
  });

  agent('opencode', 'opencode', 'POST /v1/chat/completions', () => {
    write('opencode.json', JSON.stringify({
      provider: {
        proxy: {
          npm: '@ai-sdk/openai-compatible', name: 'proxy', options: { baseURL: `${url}/v1`, apiKey: token },
          models: { 'gpt-5-mini': { name: 'GPT-5 mini' } },
        },
      },
      model: 'proxy/gpt-5-mini', small_model: 'proxy/gpt-5-mini', autoupdate: false, share: 'disabled',
    }));
    return run('opencode', ['run', prompt], {});
  });
});
