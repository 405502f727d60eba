// This file holds the default answers of the scripted provider: the shapes and the order of events that OpenAI and
// Anthropic document, with predictable contents.
import { setTimeout as pause } from 'node:timers/promises';

const created = 1764000000;
export const words = ['The', ' quick', ' brown', ' fox', ' — über', ' 日本', ' 🦊', '.'];
export const text = words.join('');
export const toolArguments = ['{"city":', '"Oslo",', '"days":', '3}'];
export const speech = Buffer.from(Array.from({ length: 70_000 }, (_, i) => (i * 7) % 256));
export const embedding = [0.25, -0.5, 0.125, 1e-7, -3.5];

const chatUsage = {
  prompt_tokens: 11, completion_tokens: 8, total_tokens: 19,
  prompt_tokens_details: { cached_tokens: 4, audio_tokens: 0 },
  completion_tokens_details: { reasoning_tokens: 2, audio_tokens: 0, accepted_prediction_tokens: 0, rejected_prediction_tokens: 0 },
};

export function answer(call, provider) {
  const path = call.url.split('?')[0];
  if (call.method === 'GET' && path.startsWith('/v1/models') && call.headers['anthropic-version']) return claudeModels(call, provider.claudes, path.slice('/v1/models/'.length));
  const handler = handlers[`${call.method} ${path}`];
  if (handler) return handler(call);
  if (call.method === 'GET' && path.startsWith('/v1/models/')) return retrieveModel(call, decodeURIComponent(path.slice('/v1/models/'.length)));
  return call.fail(404, { message: `Invalid URL (${call.method} ${path})`, type: 'invalid_request_error', param: null, code: null });
}

const handlers = {
  'POST /v1/chat/completions': chat,
  'POST /v1/completions': (call) => call.reply(200, {
    id: 'cmpl-1', object: 'text_completion', created, model: call.json.model,
    choices: [{ index: 0, text, logprobs: null, finish_reason: 'stop' }], usage: chatUsage,
  }),
  'POST /v1/embeddings': embeddings,
  'POST /v1/audio/transcriptions': transcription,
  'POST /v1/audio/speech': (call) => call.reply(200, speech),
  'POST /v1/images/generations': (call) => call.reply(200, {
    created, data: [{ b64_json: speech.subarray(0, 300).toString('base64') }],
    usage: { input_tokens: 9, output_tokens: 200, total_tokens: 209, input_tokens_details: { text_tokens: 9, image_tokens: 0 } },
  }),
  'POST /v1/moderations': (call) => call.reply(200, {
    id: 'modr-1', model: 'omni-moderation-2024-09-26',
    results: [{ flagged: true, categories: { violence: true }, category_scores: { violence: 0.97 }, category_applied_input_types: { violence: ['text'] } }],
  }),
  'GET /v1/models': (call) => call.reply(200, { object: 'list', data: ['gpt-4o-mini', 'gpt-4o', 'meta/llama-3-70b'].map(model) }),
  'POST /v1/responses': responses,
  'POST /v1/responses/input_tokens': (call) => call.reply(200, { object: 'response.input_tokens', input_tokens: 11 }),
  'POST /v1/messages': messages,
  'POST /v1/messages/count_tokens': (call) => call.reply(200, { input_tokens: 14 }),
};

const model = (id) => ({ id, object: 'model', created, owned_by: 'provider' });

// Anthropic's lists are paginated; a page has at most three models.
function claudeModels(call, ids, id) {
  const claude = (name) => ({ type: 'model', id: name, display_name: name.toUpperCase(), created_at: '2025-10-01T00:00:00Z' });
  if (id) return ids.includes(id) ? call.reply(200, claude(id)) : call.reply(404, { type: 'error', error: { type: 'not_found_error', message: `model: ${id}` } });
  const query = new URL(call.url, 'http://x').searchParams;
  const from = ids.indexOf(query.get('after_id')) + 1;
  const page = ids.slice(from, from + Math.min(3, query.get('limit') ?? 20));
  return call.reply(200, { data: page.map(claude), has_more: from + page.length < ids.length, first_id: page.at(0) ?? null, last_id: page.at(-1) ?? null });
}

function retrieveModel(call, id) {
  if (id === 'nonesuch') return call.fail(404, { message: "The model 'nonesuch' does not exist", type: 'invalid_request_error', param: 'model', code: 'model_not_found' });
  return call.reply(200, model(id));
}

// The text of the model, depending on the request.
function chatMessage(request) {
  if (request.tools) {
    return { role: 'assistant', content: null, refusal: null, tool_calls: [{ id: 'call_1', type: 'function', function: { name: request.tools[0].function.name, arguments: toolArguments.join('') } }] };
  }
  const content = request.response_format?.type === 'json_schema' ? toolArguments.join('') : text;
  return { role: 'assistant', content, refusal: null, annotations: [] };
}

async function chat(call) {
  const request = call.json;
  if (request.stream) return streamChat(call, request);
  return call.reply(200, {
    id: 'chatcmpl-1', object: 'chat.completion', created, model: `${request.model}-2024-07-18`,
    choices: [{ index: 0, message: chatMessage(request), logprobs: null, finish_reason: request.tools ? 'tool_calls' : 'stop' }],
    usage: chatUsage, service_tier: 'default', system_fingerprint: 'fp_1',
  }, { 'openai-processing-ms': '12', 'openai-version': '2020-10-01', 'openai-organization': 'org-of-the-owner', 'x-ratelimit-remaining-requests': '99' });
}

export function chatChunk(request, delta, finish_reason = null) {
  const withUsage = request.stream_options?.include_usage ? { usage: null } : {};
  return {
    id: 'chatcmpl-1', object: 'chat.completion.chunk', created, model: `${request.model}-2024-07-18`, system_fingerprint: 'fp_1',
    choices: [{ index: 0, delta, logprobs: null, finish_reason }], ...withUsage,
  };
}

async function streamChat(call, request) {
  const fn = (rest) => ({ tool_calls: [{ index: 0, ...rest }] });
  const deltas = request.tools
    ? [fn({ id: 'call_1', type: 'function', function: { name: request.tools[0].function.name, arguments: '' } }), ...toolArguments.map((s) => fn({ function: { arguments: s } }))]
    : words.map((content) => ({ content }));
  call.sse();
  call.event(chatChunk(request, { role: 'assistant', content: request.tools ? null : '', refusal: null }));
  for (const delta of deltas) {
    await pause(1); // so that events arrive one at a time
    call.event(chatChunk(request, delta));
  }
  call.event(chatChunk(request, {}, request.tools ? 'tool_calls' : 'stop'));
  if (request.stream_options?.include_usage) call.event({ ...chatChunk(request, {}), choices: [], usage: chatUsage });
  call.event('[DONE]');
  call.end();
}

function embeddings(call) {
  const { model, input, encoding_format } = call.json;
  const vector = encoding_format === 'base64' ? Buffer.from(new Float32Array(embedding).buffer).toString('base64') : embedding;
  const data = [input].flat().map((_, index) => ({ object: 'embedding', index, embedding: vector }));
  call.reply(200, { object: 'list', data, model, usage: { prompt_tokens: 6, total_tokens: 6 } });
}

// The transcript describes the upload that arrived, so that a test can check that it is complete.
async function transcription(call) {
  const form = await call.form;
  const file = form.get('file');
  const bytes = Buffer.from(await file.arrayBuffer());
  const sum = bytes.reduce((a, b) => (a * 31 + b) % 1_000_003, 7);
  call.reply(200, { text: `${file.name} ${bytes.length} ${sum} ${form.get('model')}`, usage: { type: 'tokens', input_tokens: 14, output_tokens: 5, total_tokens: 19 } });
}

function responses(call) {
  const request = call.json;
  const item = (status, content) => ({ id: 'msg_1', type: 'message', status, role: 'assistant', content });
  const part = { type: 'output_text', text, annotations: [], logprobs: [] };
  const response = (status, output, usage) => ({
    id: 'resp_1', object: 'response', created_at: created, status, error: null, incomplete_details: null, instructions: null, max_output_tokens: null,
    model: request.model, output, parallel_tool_calls: true, previous_response_id: null, store: false, temperature: 1, text: { format: { type: 'text' } },
    tool_choice: 'auto', tools: [], top_p: 1, truncation: 'disabled', metadata: {}, usage,
  });
  const usage = { input_tokens: 11, input_tokens_details: { cached_tokens: 4 }, output_tokens: 8, output_tokens_details: { reasoning_tokens: 2 }, total_tokens: 19 };
  const whole = response('completed', [item('completed', [part])], usage);
  if (!request.stream) return call.reply(200, whole);
  const at = { item_id: 'msg_1', output_index: 0, content_index: 0 };
  const events = [
    { type: 'response.created', response: response('in_progress', [], null) },
    { type: 'response.in_progress', response: response('in_progress', [], null) },
    { type: 'response.output_item.added', output_index: 0, item: item('in_progress', []) },
    { type: 'response.content_part.added', ...at, part: { ...part, text: '' } },
    ...words.map((delta) => ({ type: 'response.output_text.delta', ...at, delta, logprobs: [] })),
    { type: 'response.output_text.done', ...at, text, logprobs: [] },
    { type: 'response.content_part.done', ...at, part },
    { type: 'response.output_item.done', output_index: 0, item: item('completed', [part]) },
    { type: 'response.completed', response: whole },
  ];
  call.sse();
  events.forEach((event, sequence_number) => call.event({ ...event, sequence_number }, event.type));
  call.end();
}

function messages(call) {
  const request = call.json;
  const block = request.tools ? { type: 'tool_use', id: 'toolu_1', name: request.tools[0].name, input: JSON.parse(toolArguments.join('')) } : { type: 'text', text };
  const stop_reason = request.tools ? 'tool_use' : 'end_turn';
  const usage = { input_tokens: 10, cache_creation_input_tokens: 0, cache_read_input_tokens: 4, output_tokens: 8, service_tier: 'standard' };
  const message = { id: 'msg_1', type: 'message', role: 'assistant', model: request.model, content: [block], stop_reason, stop_sequence: null, usage };
  if (!request.stream) return call.reply(200, message, { 'anthropic-ratelimit-requests-remaining': '49', 'anthropic-organization-id': 'org-of-the-owner' });
  const deltas = request.tools ? toolArguments.map((partial_json) => ({ type: 'input_json_delta', partial_json })) : words.map((text) => ({ type: 'text_delta', text }));
  const events = [
    { type: 'message_start', message: { ...message, content: [], stop_reason: null, usage: { ...usage, output_tokens: 1 } } },
    { type: 'content_block_start', index: 0, content_block: request.tools ? { ...block, input: {} } : { type: 'text', text: '' } },
    { type: 'ping' },
    ...deltas.map((delta) => ({ type: 'content_block_delta', index: 0, delta })),
    { type: 'content_block_stop', index: 0 },
    { type: 'message_delta', delta: { stop_reason, stop_sequence: null }, usage: { output_tokens: 8 } },
    { type: 'message_stop' },
  ];
  call.sse();
  for (const event of events) call.event(event, event.type);
  call.end();
}
