// This file runs real coding agents against `llm-proxy demo`, headless and with the settings of docs/agents.md: a prompt in,
// an answer out, and each call on record. An agent that is not installed is skipped. To run all of them:
//   npm install --prefix DIR @anthropic-ai/claude-code @openai/codex @google/gemini-cli opencode-ai, then
//   LLM_PROXY_AGENTS=DIR node --test agents.test.mjs
import assert from 'node:assert/strict';
import { execFile } from 'node:child_process';
import { existsSync, mkdirSync, mkdtempSync, rmSync, writeFileSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { dirname, join } from 'node:path';
import { after, before, beforeEach, describe, test } from 'node:test';
import { fileURLToPath } from 'node:url';
import { Demo } from './proxy.mjs';

const folder = join(process.env.LLM_PROXY_AGENTS ?? fileURLToPath(new URL('.', import.meta.url)), 'node_modules', '.bin');
const prompt = 'Say hello';

let demo, url, token, dir;
before(async () => {
  demo = await Demo.start();
  ({ url, token } = demo);
});
after(() => demo.stop());
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
    const data = await demo.calls(since);
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

  agent('Gemini CLI', 'gemini', 'POST /v1beta/models/{model}:streamGenerateContent', () => {
    write('.gemini/settings.json', JSON.stringify({ security: { auth: { selectedType: 'gemini-api-key' } } }));
    return run('gemini', ['-p', prompt, '--skip-trust'], { GOOGLE_GEMINI_BASE_URL: url, GEMINI_API_KEY: token });
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
