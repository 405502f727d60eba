// This file is the scripted provider of the tests: an HTTP server that speaks OpenAI's and Anthropic's APIs, records what it
// receives, and fails as a test's script says. Its default answers are in answers.mjs.
import { createServer } from 'node:http';
import { once } from 'node:events';
import { answer } from './answers.mjs';

// A Call is one request that reached the provider, and its answer.
export class Call {
  constructor(request, response, body) {
    this.method = request.method;
    this.url = request.url;
    this.headers = request.headers;
    this.body = body;
    this.at = performance.now();
    this.response = response;
    // gone resolves when the connection ends before the answer is complete.
    this.gone = new Promise((resolve) => response.once('close', () => response.writableFinished || resolve()));
  }

  get json() {
    return JSON.parse(this.body.toString());
  }

  get form() {
    return new Response(this.body, { headers: { 'content-type': this.headers['content-type'] } }).formData();
  }

  head(status, headers) {
    this.response.writeHead(status, { 'x-request-id': 'req_of_provider', 'request-id': 'req_of_provider', ...headers });
    this.response.flushHeaders();
  }

  reply(status, value, headers = {}) {
    const binary = Buffer.isBuffer(value);
    const body = binary ? value : Buffer.from(JSON.stringify(value));
    this.head(status, { 'content-type': binary ? 'audio/mpeg' : 'application/json', 'content-length': body.length, ...headers });
    this.response.end(body);
  }

  fail(status, error, headers) {
    this.reply(status, { error }, headers);
  }

  sse() {
    this.head(200, { 'content-type': 'text/event-stream; charset=utf-8' });
  }

  // event writes one event; value is its data.
  event(value, name) {
    const data = typeof value === 'string' ? value : JSON.stringify(value);
    this.response.write((name ? `event: ${name}\n` : '') + `data: ${data}\n\n`);
  }

  end() {
    this.response.end();
  }

  // cut resets the connection, so that no client can mistake it for the end of the answer.
  cut() {
    this.response.socket.resetAndDestroy();
  }
}

export class Provider {
  openaiKey = 'sk-provider-openai-0Qk7TzW4nXc2';
  anthropicKey = 'sk-ant-provider-9LmVb3RyHs6d';
  claudes = []; // the models in Anthropic's list
  calls = [];
  #scripts = [];

  static async start() {
    const p = new Provider();
    p.server = createServer((request, response) => p.#serve(request, response));
    p.server.listen(0, '127.0.0.1');
    await once(p.server, 'listening');
    p.url = `http://127.0.0.1:${p.server.address().port}`;
    return p;
  }

  // script makes each function answer one of the next requests, in order, instead of the default answer.
  script(...functions) {
    this.#scripts.push(...functions);
  }

  // reset forgets the recorded requests, and throws if a script was not used.
  reset() {
    this.calls = [];
    const unused = this.#scripts.splice(0).length;
    if (unused > 0) throw new Error(`${unused} scripted answers were not used`);
  }

  get last() {
    return this.calls.at(-1);
  }

  async #serve(request, response) {
    response.on('error', () => {}); // some tests disconnect on purpose
    const chunks = [];
    try {
      for await (const chunk of request) chunks.push(chunk);
    } catch {
      return; // the request was cut because the proxy's client disconnected
    }
    const call = new Call(request, response, Buffer.concat(chunks));
    this.calls.push(call);
    const script = this.#scripts.shift();
    if (script) return script(call);
    const { authorization, 'x-api-key': key } = call.headers;
    const rightful = call.url.startsWith('/v1/messages') || call.headers['anthropic-version']
      ? key === this.anthropicKey && authorization === undefined
      : authorization === `Bearer ${this.openaiKey}` && key === undefined;
    if (!rightful) return call.fail(401, { message: 'Incorrect API key provided.', type: 'invalid_request_error', param: null, code: 'invalid_api_key' });
    return answer(call, this);
  }

  close() {
    this.server.close();
    this.server.closeAllConnections();
  }
}
