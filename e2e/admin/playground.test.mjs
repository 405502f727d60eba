// Tests of the playground in a real browser: an answer that is seen while it arrives, stopped, cut off and refused; a
// conversation of several turns; and all of that without scripts.
import assert from 'node:assert/strict';
import { test } from 'node:test';
import { Proxy, within } from '../proxy.mjs';
import { describePages } from './browser.mjs';

describePages('the playground', new Proxy(), (proxy, visit) => {
  const delta = (content) => ({ id: 'c', object: 'chat.completion.chunk', created: 1, model: 'gpt-4o-mini', choices: [{ index: 0, delta: { content } }] });
  const open = async (options) => {
    const visitor = await visit(options);
    await visitor.signIn();
    await visitor.page.getByRole('link', { name: 'Playground', exact: true }).click();
    await visitor.page.getByLabel('Model', { exact: true }).fill('gpt-4o-mini');
    if (options?.javaScriptEnabled !== false) await visitor.page.locator('#models option').first().waitFor({ state: 'attached' }); // the field has asked for them
    return visitor;
  };
  const send = async (page, text) => {
    await page.getByLabel('Message').fill(text);
    await page.getByRole('button', { name: 'Send' }).click();
  };
  const turns = (page) => page.locator('#conversation .says').allTextContents();

  test('an answer is shown as it arrives, and with what it cost', async () => {
    const visitor = await open();
    const { page } = visitor;
    let provider;
    proxy.provider.script((c) => {
      provider = c;
      c.sse();
      c.event(delta('<b>Hel'));
    });
    await send(page, 'Hello');
    await page.getByText('<b>Hel', { exact: true }).waitFor(); // as text, before the answer has ended
    assert.deepEqual(await turns(page), []);
    assert.equal(await page.getByLabel('Message').inputValue(), '');
    await visitor.look('playground-answering');
    provider.event(delta('lo</b>'));
    provider.event({ ...delta(), choices: [], usage: { prompt_tokens: 9, completion_tokens: 3, total_tokens: 12 } });
    provider.event('[DONE]');
    provider.end();
    const result = page.getByRole('region', { name: 'The last call' });
    await result.getByText('9 / 3').waitFor();
    assert.deepEqual(await turns(page), ['Hello', '<b>Hello</b>']);
    for (const text of ['ok', 'primary', 'Time to the first text', /^\$0\.00000/]) await result.getByText(text, { exact: text === 'ok' }).first().waitFor();
    await page.getByText('Response headers').click();
    await page.getByText(/^X-Llm-Proxy-Request-Id: req_/m).waitFor();
    await visitor.look('playground-answered');

    proxy.provider.script((c) => {
      assert.deepEqual(c.json.messages.map((m) => [m.role, m.content]), [['user', 'Hello'], ['assistant', '<b>Hello</b>'], ['user', 'And?']]);
      c.sse();
      c.event(delta('That'));
      c.cut();
    });
    await send(page, 'And?');
    await page.getByRole('alert').getByText('The answer broke off.').waitFor();
    assert.equal((await turns(page)).length, 2, 'what broke off is not a part of the conversation');
    assert.equal(await page.getByLabel('Message').inputValue(), 'And?', 'and can be sent again');
    await visitor.look('playground-broken');
    await page.getByRole('link', { name: 'See the call' }).click();
    await page.getByText('truncated').first().waitFor();
    await page.getByRole('link', { name: /^source=playground$/ }).waitFor();
    await visitor.end();
  });

  test('Stop ends the call, and keeps what came', async () => {
    const visitor = await open();
    const { page } = visitor;
    let provider;
    proxy.provider.script((c) => {
      provider = c;
      c.sse();
      c.event(delta('Once upon'));
    });
    await page.getByLabel('Message').fill('A story');
    await page.keyboard.press('Control+Enter');
    await page.getByText('Once upon').waitFor();
    await page.getByRole('button', { name: 'Stop' }).click();
    await within(30_000, provider.gone, 'the provider is left');
    await page.getByText('client disconnected').waitFor();
    assert.deepEqual(await turns(page), ['A story', 'Once upon']);
    assert.equal(await page.getByRole('button', { name: 'Stop' }).isVisible(), false);
    await visitor.end();
  });

  test('a refused call says why, and a session that has ended keeps the message', async () => {
    const limited = await proxy.manage('POST', '/manage/projects', { name: 'limited', openai_api_key: proxy.provider.openaiKey, policy: { models: ['gpt-4o*'] } });
    const visitor = await open();
    const { page } = visitor;
    let goOn;
    const typed = new Promise((resolve) => { goOn = resolve; });
    await page.route(/playground\?project_id=/, async (route) => { await typed; await route.continue(); }, { times: 1 });
    const loaded = page.waitForResponse(/playground\?project_id=/);
    await page.getByLabel('Project').selectOption('limited');
    await page.getByLabel('Model', { exact: true }).fill('o3'); // before the page knows the project's models
    goOn();
    await (await loaded).finished();
    await page.locator(`#new-conversation[href*="${limited.id}"], #new-conversation [href*="${limited.id}"]`).waitFor();
    assert.equal(await page.getByLabel('Model', { exact: true }).inputValue(), 'o3');
    await send(page, 'Hello');
    await page.getByRole('alert').getByText('403 Forbidden. This token may not use this model').waitFor();
    await page.getByRole('link', { name: 'See the call' }).click();
    await page.getByText('Why it was refused').waitFor();
    await page.goto(`${proxy.url}/admin/projects/${limited.id}`);
    await page.getByRole('link', { name: 'Try it' }).click();
    await page.waitForLoadState();
    assert.equal(await page.getByLabel('Project').inputValue(), limited.id);
    await visitor.context.clearCookies();
    await send(page, 'Kept over the sign-in');
    await page.getByLabel('Management key').fill(proxy.managementToken);
    await page.getByRole('button', { name: 'Sign in' }).click();
    await page.getByText('Your input is still here').waitFor();
    assert.equal(await page.getByLabel('Message').inputValue(), 'Kept over the sign-in');
    assert.equal(await page.getByLabel('Project').inputValue(), limited.id);
    await page.getByLabel('Model', { exact: true }).focus(); // the models are asked for
    await page.locator('#models option[value="gpt-4o-mini"]').waitFor({ state: 'attached' });
    await visitor.end();
  });

  test('all of it works without scripts', async () => {
    const visitor = await open({ javaScriptEnabled: false });
    const { page } = visitor;
    await page.getByText('Advanced').click();
    await page.getByLabel('System prompt').fill('Be brief.');
    await send(page, 'Hello');
    await page.getByRole('region', { name: 'The last call' }).waitFor();
    const [question, first] = await turns(page);
    assert.equal(question, 'Hello');
    assert.ok(first.length > 0);
    assert.deepEqual(proxy.provider.last.json.messages[0], { role: 'system', content: 'Be brief.' });
    assert.equal(proxy.provider.last.json.stream, undefined);
    await send(page, 'And?');
    await page.locator('#conversation .turn').nth(3).waitFor();
    assert.deepEqual(proxy.provider.last.json.messages.map((m) => m.content), ['Be brief.', 'Hello', first, 'And?']);
    await page.getByRole('button', { name: 'Show as curl' }).click();
    await page.getByText('Authorization: Bearer $LLM_PROXY_TOKEN').waitFor();
    await page.getByRole('button', { name: 'List models' }).click();
    assert.ok(await page.locator('#models option').count() > 0);
    assert.equal((await turns(page)).length, 4, 'the conversation is still there');
    await visitor.end();
  });
});
