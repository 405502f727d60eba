// Tests of the pages of /admin in a real browser: an administrator's journey from the first project to a
// revoked token, with and without scripts; and every page at two widths, in light and dark mode, with an
// accessibility checker.
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { test } from 'node:test';
import { Proxy, within } from '../proxy.mjs';
import { describePages } from './browser.mjs';

describePages('the pages', new Proxy(), (proxy, visit) => {
  for (const javaScriptEnabled of [true, false]) {
    test(`from a project to a revoked token, scripts ${javaScriptEnabled ? 'on' : 'off'}`, async () => {
      const visitor = await visit({ javaScriptEnabled });
      const { page } = visitor;
      const name = `Journey ${javaScriptEnabled ? 'with' : 'without'} scripts`;
      const go = (link) => page.getByRole('navigation', { name: 'Main' }).getByRole('link', { name: link, exact: true }).click();

      await page.goto(`${proxy.url}/admin/tokens`);
      await page.getByLabel('Management key').fill('wrong');
      await page.getByRole('button', { name: 'Sign in' }).click();
      await page.getByText('This key is not valid').waitFor();
      await page.getByLabel('Management key').fill(proxy.managementToken);
      await page.getByRole('button', { name: 'Sign in' }).click();
      await page.getByRole('heading', { name: 'Tokens' }).waitFor(); // the page that was asked for

      await go('Projects');
      await page.getByRole('link', { name: 'New project' }).click();
      await page.getByLabel('Name', { exact: true }).fill(name);
      await page.getByLabel('API key').fill('sk-****');
      await page.getByRole('button', { name: 'Create project' }).click();
      await page.getByRole('alert').getByRole('link', { name: /^API key .*masked/ }).click(); // in the summary
      assert.equal(await page.evaluate(() => document.activeElement.name), 'api_key');
      assert.equal(await page.getByLabel('Name', { exact: true }).inputValue(), name, 'the input is kept');
      assert.equal(await page.getByLabel('API key').inputValue(), '', 'but not the key');
      await page.getByLabel('API key').fill(proxy.provider.openaiKey);
      await page.getByLabel('Maximum').first().fill('500');
      await page.getByRole('button', { name: 'Create project' }).click();
      await page.getByText('Project created').waitFor();
      await page.getByRole('cell', { name: '$0.00 of $500.00' }).waitFor();

      await page.getByRole('link', { name: 'New token' }).first().click();
      await page.getByLabel('Name', { exact: true }).fill('browser');
      await page.getByLabel('Expires', { exact: true }).selectOption('In 7 days');
      await page.getByRole('button', { name: 'Create token' }).click();
      const token = await page.locator('#secret').textContent();
      assert.match(token, /^sk-llmp_\w{58}$/);
      const copy = page.getByRole('button', { name: 'Copy token' });
      assert.equal(await copy.isVisible(), javaScriptEnabled);
      if (javaScriptEnabled) {
        await copy.click();
        await page.getByRole('button', { name: 'Copied' }).waitFor();
        assert.equal(await page.evaluate(() => navigator.clipboard.readText()), token);
      }
      for (const text of ['curl', 'Python', 'Node', 'Go']) await page.getByRole('heading', { name: text }).waitFor();
      await page.getByRole('link', { name: 'Done, open browser' }).click();
      await page.getByRole('heading', { name: 'browser' }).waitFor();
      assert.ok(!(await page.content()).includes(token), 'it is shown once');

      assert.equal((await proxy.call(token)).status, 200);
      await page.reload();
      await page.getByRole('cell', { name: 'POST /v1/chat/completions' }).waitFor();
      const pageOfToken = page.url();

      await proxy.settled();
      await go('Calls');
      await page.getByLabel('Outcome').selectOption('ok');
      await page.getByRole('button', { name: 'Apply', exact: true }).click();
      const row = page.getByRole('row', { name: new RegExp(`${name} browser`) });
      await row.waitFor();
      for (let i = 0; i < 2; i++) { // again and again, on the same page
        const file = page.waitForEvent('download');
        await page.getByRole('button', { name: 'Download as CSV' }).click();
        assert.match(readFileSync(await (await file).path(), 'utf8'), new RegExp(`^id,started_at,[^\n]*\nreq_\\w{13},[^\n]*,${name},`));
        if (javaScriptEnabled) await page.waitForFunction(() => !document.querySelector('form[data-sent]'));
      }
      await row.getByRole('link').first().click();
      await page.getByRole('heading', { name: 'Time' }).waitFor();
      await go('Dashboard');
      await page.getByText('24 hours', { exact: true }).click(); // a script applies it
      if (!javaScriptEnabled) await page.getByRole('button', { name: 'Apply', exact: true }).click();
      await page.waitForURL(/period=24h/);
      await page.getByRole('heading', { name: 'Calls by project' }).waitFor();
      await page.getByRole('rowheader', { name: `browser ${name}` }).waitFor();
      await page.getByText('Show numbers').first().click();
      await page.getByRole('region', { name: 'Calls by project: numbers' }).getByRole('columnheader', { name }).waitFor();

      proxy.provider.script((c) => { c.sse(); c.event({ choices: [{ index: 0, delta: { content: 'Hel' } }] }); });
      const stream = (await proxy.call(token, { stream: true })).body.getReader();
      await stream.read();
      await go('Running calls');
      await page.getByRole('cell', { name: 'browser' }).waitFor();
      await page.getByRole('link', { name: /^End req_/ }).click();
      await page.getByRole('button', { name: 'End call' }).click();
      await page.getByText('The call was ended').waitFor();
      await assert.rejects(within(30_000, (async () => { while (!(await stream.read()).done); })(), 'the stream ends'), /terminated|aborted|other side closed/);

      await page.goto(pageOfToken);
      await page.getByRole('link', { name: 'Revoke' }).click();
      await page.getByRole('button', { name: 'Revoke' }).click();
      await page.getByText('revoked', { exact: true }).waitFor();
      await page.getByText('1 token revoked, effective immediately').waitFor();
      await page.reload();
      assert.equal(await page.locator('.notice').count(), 0, 'a notice is shown once');
      assert.equal((await proxy.call(token)).status, 401);

      await go('Audit trail');
      await page.getByRole('cell', { name: 'token.revoke' }).first().waitFor();
      await page.getByRole('link', { name: 'Verify the trail' }).click();
      await page.getByText('none is missing').waitFor();

      await page.getByRole('button', { name: 'Sign out' }).click();
      await page.getByText('You are signed out').waitFor();
      await page.goBack();
      await page.goto(pageOfToken);
      await page.getByRole('heading', { name: 'Sign in' }).waitFor();
      await visitor.end();
    });
  }

  test('the pages work with the keyboard alone', async () => {
    const visitor = await visit();
    const { page } = visitor;
    await page.goto(`${proxy.url}/admin/`);
    await page.keyboard.type(proxy.managementToken); // the field has the focus
    await page.keyboard.press('Enter');
    await page.getByRole('navigation', { name: 'Main' }).waitFor();
    await page.goto(`${proxy.url}/admin/projects/new`);
    await page.keyboard.press('Tab');
    assert.equal(await page.evaluate(() => document.activeElement.textContent), 'Skip to content');
    await page.keyboard.press('Enter');
    assert.equal(await page.evaluate(() => document.activeElement.id), 'main');
    const reached = new Set();
    for (let i = 0; i < 80; i++) {
      await page.keyboard.press('Tab');
      const at = await page.evaluate(() => {
        const e = document.activeElement;
        const style = getComputedStyle(e);
        return { name: e.name || e.textContent.trim(), outline: style.outlineStyle !== 'none' && parseFloat(style.outlineWidth) > 0, body: e === document.body };
      });
      if (at.body) break;
      reached.add(at.name);
      assert.ok(at.outline, `${at.name} shows no focus`);
    }
    for (const name of ['name', 'provider', 'api_key', 'policy.models', 'policy.limits[0].max', 'policy.limits[0].shadow', 'remove_limit', 'add_limit', 'preset', 'Create project', 'Cancel']) {
      assert.ok(reached.has(name), `${name} is not reached: ${[...reached]}`);
    }
    await visitor.end();
  });

  for (const javaScriptEnabled of [true, false]) {
    test(`limits are added and removed in place, and presets fill in a form, scripts ${javaScriptEnabled ? 'on' : 'off'}`, async () => {
      const visitor = await visit({ javaScriptEnabled });
      const { page } = visitor;
      const name = `Rows ${javaScriptEnabled ? 'with' : 'without'} scripts`;
      await visitor.signIn();
      await page.goto(`${proxy.url}/admin/projects/new`);
      const limit = (n) => page.getByRole('group', { name: `Limit ${n}`, exact: true });
      const add = page.getByRole('button', { name: 'Add a limit' });
      await page.getByLabel('Name', { exact: true }).fill(name);
      await page.getByLabel('API key').fill(proxy.provider.openaiKey);
      await limit(1).getByLabel('Maximum').fill('5');
      await add.click();
      await limit(2).waitFor();
      assert.equal(await page.evaluate(() => document.activeElement.id), 'limit-1-max', 'the new row has the focus');
      await page.keyboard.type('50');
      await limit(2).getByLabel('Metric').selectOption('dollars');
      await limit(2).getByLabel('Period').selectOption('per month');
      await limit(2).getByLabel('for models').fill('gpt-5*');
      await add.click();
      await limit(3).getByLabel('Maximum').fill('7');
      await limit(1).getByRole('button', { name: 'Remove limit 1' }).click();
      await limit(3).waitFor({ state: 'detached' });
      assert.equal(await limit(1).getByLabel('Maximum').inputValue(), '50', 'the other rows stay');
      assert.equal(await page.getByLabel('Name', { exact: true }).inputValue(), name, 'the input is kept');
      assert.equal(await page.getByLabel('API key').inputValue(), javaScriptEnabled ? proxy.provider.openaiKey : '', 'a key never comes back from the server');
      await limit(2).getByLabel('for each').fill('user');
      await page.getByLabel('Name', { exact: true }).press('Enter'); // sends the form, and presses none of its other buttons
      await page.getByRole('alert').getByRole('link', { name: /^Limit 2: For each must be/ }).click();
      assert.match(await page.evaluate(() => document.activeElement.name), /for_each$/);
      if (javaScriptEnabled) assert.deepEqual(await visitor.violations(), []); // the checker is a script
      await limit(2).getByLabel('for each').fill('end_user');
      await page.getByRole('button', { name: 'Create project' }).click();
      await page.getByText('Project created').waitFor();
      await page.getByRole('cell', { name: '$50.00 per month for models gpt-5*', exact: true }).waitFor();
      await page.getByRole('cell', { name: '7 requests per minute for each end user', exact: true }).waitFor();

      await page.goto(`${proxy.url}/admin/tokens/new?project_id=${proxy.project}`);
      await page.getByLabel('Name', { exact: true }).fill(name);
      await page.getByText('Advanced').click();
      await page.getByRole('textbox', { name: 'Client addresses' }).fill('127.0.0.1');
      await page.getByRole('button', { name: 'Batch job' }).click();
      await page.getByText('Filled in: Batch job').waitFor();
      assert.equal(await limit(1).getByLabel('Maximum').inputValue(), '100');
      await page.getByRole('button', { name: 'Public demo' }).click();
      await page.getByText('Filled in: Public demo').waitFor();
      assert.equal(await limit(2).getByLabel('for each').inputValue(), 'end_user');
      assert.match(await page.getByRole('textbox', { name: 'Models optional' }).inputValue(), /^gpt-4o-mini\n/);
      assert.equal(await page.getByRole('textbox', { name: 'Client addresses' }).inputValue(), '127.0.0.1', 'what a preset does not set is kept');
      assert.equal(await page.getByLabel('Expires', { exact: true }).inputValue(), '168');
      await limit(4).getByRole('button', { name: 'Remove limit 4' }).click();
      await limit(4).waitFor({ state: 'detached' });
      await page.getByRole('button', { name: 'Create token' }).click();
      const token = await page.locator('#secret').textContent();
      assert.equal((await proxy.call(token)).status, 200);
      await page.getByRole('link', { name: /^Done, open/ }).click();
      await page.getByRole('cell', { name: '100 requests per day for each end user', exact: true }).waitFor();
      await visitor.end();
    });
  }

  for (const javaScriptEnabled of [true, false]) {
    test(`a key is tested when it is entered, and a project is made like another, scripts ${javaScriptEnabled ? 'on' : 'off'}`, async () => {
      const visitor = await visit({ javaScriptEnabled });
      const { page } = visitor;
      const name = `Tested ${javaScriptEnabled ? 'with' : 'without'} scripts`;
      const models = (c) => c.reply(200, { object: 'list', data: [{ id: 'gpt-5' }, { id: 'gpt-5-mini' }] });
      const refused = (c) => c.fail(401, { message: `Incorrect API key provided: ${proxy.provider.openaiKey}`, code: 'invalid_api_key' });
      await visitor.signIn();
      await page.goto(`${proxy.url}/admin/projects/new`);
      await page.getByLabel('Name', { exact: true }).fill(name);
      await page.getByLabel('API key').fill(proxy.provider.openaiKey);
      proxy.provider.script(models);
      await page.getByRole('button', { name: 'Create project' }).click();
      await page.getByText('The key works: 2 models.').waitFor();
      proxy.provider.script(refused);
      await page.getByRole('button', { name: 'Test key of primary' }).click();
      await page.getByText('The provider refuses the key: 401 invalid_api_key.', { exact: true }).waitFor();
      if (javaScriptEnabled) assert.deepEqual(await visitor.violations(), []);
      assert.ok(!(await page.content()).includes(proxy.provider.openaiKey));
      await page.reload();
      assert.equal(await page.getByText('The provider refuses').count(), 0, 'a result is shown once');

      await page.getByRole('link', { name: 'New project like this' }).click();
      await page.getByRole('heading', { name: `New project like ${name}` }).waitFor();
      await page.getByLabel('API key of primary').fill('sk-****');
      await page.getByRole('button', { name: 'Create project' }).click({ noWaitAfter: true });
      assert.equal(await page.evaluate(() => document.activeElement.name), 'name', 'a project needs a name');
      await page.getByLabel('Name', { exact: true }).fill(`${name}, twin`);
      await page.getByRole('button', { name: 'Create project' }).click();
      await page.getByRole('alert').getByRole('link', { name: /^API key of primary looks masked/ }).click();
      await page.getByLabel('API key of primary').fill(proxy.provider.openaiKey);
      proxy.provider.script(refused);
      await page.getByRole('button', { name: 'Create project' }).click();
      await page.getByText('The provider refuses the key: 401 invalid_api_key. It was saved anyway.').waitFor();
      await page.getByRole('heading', { name: `${name}, twin` }).waitFor();
      await page.getByRole('cell', { name: 'primary', exact: true }).waitFor();
      await visitor.end();
    });
  }

  test('the response cache is turned on, seen and emptied', async () => {
    const visitor = await visit();
    const { page } = visitor;
    await page.goto(`${proxy.url}/admin/sign-in`);
    await visitor.signIn();
    const project = await proxy.manage('POST', '/manage/projects', { name: 'cached', openai_api_key: proxy.provider.openaiKey });
    const { token } = await proxy.manage('POST', '/manage/tokens', { project_id: project.id, name: 'repeats' });
    const ask = async () => {
      const answer = await proxy.call(token, { temperature: 0 });
      const body = await answer.text();
      await proxy.settled();
      return [answer.headers.get('cache-status'), body];
    };
    const pageOfProject = `${proxy.url}/admin/projects/${project.id}`;
    await page.goto(`${pageOfProject}/edit`);
    await page.getByText('Advanced').click();
    await page.getByRole('textbox', { name: 'Cached endpoints' }).fill('/v1/files');
    await page.getByRole('button', { name: 'Save' }).click();
    await page.getByText('is required and must be from 1').first().waitFor();
    assert.equal(await page.evaluate(() => document.activeElement.name), 'policy.cache.ttl_seconds', 'the first field with an error has the focus');
    await page.getByLabel('Use an answer for (seconds)').fill('3600');
    await page.getByRole('textbox', { name: 'Cached endpoints' }).fill('/v1/chat/*');
    await page.getByRole('button', { name: 'Save' }).click();
    await page.getByRole('heading', { name: 'Response cache' }).waitFor();
    const [miss, first] = await ask();
    const [hit, second] = await ask();
    assert.match(miss, /fwd=miss; stored/);
    assert.match(hit, /^llm-proxy; hit; ttl=3/);
    assert.equal(first, second);
    await page.goto(`${proxy.url}/admin/requests?project=${project.id}`);
    await page.getByText('More filters').click();
    await page.getByLabel('Cache', { exact: true }).selectOption('Hit');
    await page.getByRole('button', { name: 'Apply', exact: true }).click();
    await page.getByText('cache: hit').waitFor();
    await page.locator('table.calls tbody a.name').click();
    await page.getByText(/^hit: saved \$/).waitFor();
    await page.goto(`${proxy.url}/admin/dashboard?project=${project.id}`);
    await page.getByText(/1 call was answered from the cache, 50.0% of all calls/).waitFor();
    await page.goto(pageOfProject);
    await page.getByRole('link', { name: 'Empty cache' }).click();
    await page.getByRole('button', { name: 'Empty cache' }).click();
    await page.getByRole('heading', { name: 'Response cache' }).waitFor();
    assert.equal(await page.getByRole('link', { name: 'Empty cache' }).count(), 0);
    assert.match((await ask())[0], /fwd=miss/);
    await visitor.end();
  });

  test('tables fit, show that they scroll, and keep their actions in view', async () => {
    const visitor = await visit();
    const { page } = visitor;
    await page.goto(`${proxy.url}/admin/sign-in`);
    await visitor.signIn();
    await proxy.manage('POST', '/manage/keys', { name: 'somebody else', role: 'viewer' });
    await proxy.manage('POST', '/manage/prices', { match: 'a-model-with-a-long-name', input: 1, output: 2 });
    const { token } = await proxy.manage('POST', '/manage/tokens', { project_id: proxy.project, name: 'an integration with a long name' });
    proxy.provider.script((c) => { c.sse(); c.event({ choices: [{ index: 0, delta: { content: 'Hel' } }] }); });
    const stream = (await proxy.call(token, { stream: true })).body.getReader();
    await stream.read();
    const seen = { scroll: 0, actions: 0 };
    // After the other widths, tables are made too wide.
    for (const width of [1920, 1440, 1280, 1024, 960, 820, 768, 375, 1023]) {
      await page.setViewportSize({ width, height: 850 });
      for (const path of ['/admin/streams', '/admin/requests', '/admin/tokens', '/admin/keys', '/admin/prices', '/admin/audit', `/admin/projects/${proxy.project}`]) {
        await page.goto(proxy.url + path);
        if (width === 1023) await page.locator('.table > table').evaluateAll((all) => all.forEach((t) => { t.style.width = '3000px'; }));
        await page.evaluate(() => new Promise((drawn) => { requestAnimationFrame(() => requestAnimationFrame(drawn)); })); // with the shadow, an animation
        const tables = await page.locator('.table').evaluateAll((all) => all.filter((t) => t.checkVisibility()).map((t) => {
          const box = t.getBoundingClientRect();
          const actions = [...t.querySelectorAll('.act a')].map((a) => a.getBoundingClientRect());
          const cues = [t, ...t.querySelectorAll('.act')].map((e) => getComputedStyle(e).boxShadow);
          return { width: box.width, over: t.scrollWidth - t.clientWidth, actions: actions.length, heads: [...t.querySelectorAll('th')].filter((h) => /^Actions$/.test(h.textContent)).length,
            visible: actions.every((a) => a.left >= box.left && a.right <= box.right && a.right <= innerWidth), cue: cues.some((c) => c !== 'none') };
        }));
        assert.ok(tables.length > 0, path);
        for (const t of tables) {
          const what = `${path} at ${width}: ${JSON.stringify(t)}`;
          assert.ok(t.visible && (t.heads === 0 || t.actions > 0), what);
          assert.equal(t.cue, t.over > 0, what);
          assert.equal(t.over > 0, width === 1023, what);
          if (width === 1920) assert.ok(t.width > 1600 || path.includes('proj_'), what);
          seen.actions += t.actions;
          seen.scroll += t.over > 0;
        }
      }
    }
    assert.ok(seen.actions > 15 && seen.scroll > 3, JSON.stringify(seen));
    await stream.cancel();
    await visitor.end();
  });

  for (const javaScriptEnabled of [true, false]) {
    test(`a webhook is made, tested, changed and deleted, scripts ${javaScriptEnabled ? 'on' : 'off'}`, async () => {
      const visitor = await visit({ javaScriptEnabled });
      const { page } = visitor;
      await visitor.signIn();
      await page.getByRole('link', { name: 'Webhooks', exact: true }).click();
      await page.getByRole('link', { name: 'New webhook' }).or(page.getByRole('link', { name: 'Create a webhook' })).first().click();
      await page.getByLabel('Name', { exact: true }).fill('ops');
      await page.getByLabel('URL').fill('ftp://example.com');
      await page.getByRole('button', { name: 'Create webhook' }).click();
      await page.getByRole('alert').waitFor();
      await page.getByLabel('URL').fill(`${proxy.provider.url}/hook`);
      await page.getByLabel('Tokens that expire').check();
      await page.getByRole('button', { name: 'Create webhook' }).click();
      assert.match(await page.locator('#secret').textContent(), /^whsec_/);
      await page.getByRole('link', { name: /Done/ }).click();
      await page.getByRole('button', { name: 'Send a test' }).click();
      await page.getByRole('status').waitFor();
      assert.match(await page.getByRole('status').first().textContent(), /The test was (not )?delivered/);
      await page.getByRole('button', { name: /^Redeliver/ }).first().click();
      await page.getByText('The notification is sent again.').waitFor();
      await page.getByRole('link', { name: 'Edit' }).click();
      assert.equal(await page.getByLabel('URL').inputValue(), '');
      await page.getByLabel('Active').uncheck();
      await page.getByRole('button', { name: 'Save' }).click();
      await page.getByText('inactive').waitFor();
      await page.getByRole('link', { name: 'Delete' }).click();
      await page.getByRole('button', { name: 'Delete webhook' }).click();
      await page.getByText('Webhook deleted.').waitFor();
      await visitor.end();
    });
  }

  test('times are in the time zone of the browser, and pages refresh themselves as chosen', async () => {
    const visitor = await visit({ timezoneId: 'Asia/Tokyo' });
    const plain = await visit({ javaScriptEnabled: false });
    await (await proxy.call(proxy.token)).text();
    const { id, started_at: started } = await proxy.settled();
    for (const v of [visitor, plain]) {
      await v.page.goto(`${proxy.url}/admin/sign-in`);
      await v.signIn();
      await v.page.goto(`${proxy.url}/admin/requests/${id}`);
    }
    const utc = started.slice(0, 19).replace('T', ' ');
    const tokyo = new Date(Date.parse(started) + 9 * 3600_000).toISOString().slice(0, 19).replace('T', ' ');
    const time = visitor.page.locator('time[data-show=second]').first();
    assert.equal(await time.textContent(), tokyo);
    assert.ok((await time.getAttribute('title')).startsWith(`${utc} UTC`));
    await visitor.page.getByText(/^Started \((GMT\+9|JST)\)$/).waitFor();
    assert.equal(await plain.page.locator('time[data-show=second]').first().textContent(), utc);
    await plain.page.getByText('Started (UTC)', { exact: true }).waitFor();

    await plain.page.goto(`${proxy.url}/admin/requests`);
    assert.equal(await plain.page.getByLabel('Refresh').isVisible(), false);
    const { page } = visitor;
    await page.clock.install();
    for (const [path, first] of [['/admin/requests', '0'], ['/admin/dashboard', '60'], ['/admin/streams', '10']]) {
      await page.goto(proxy.url + path);
      assert.equal(await page.getByLabel('Refresh').inputValue(), first, path);
      await page.getByLabel('Refresh').selectOption('every 10 s');
      await page.reload();
      assert.equal(await page.getByLabel('Refresh').inputValue(), '10', `${path} remembers the choice`);
      const fetched = page.waitForRequest((r) => r.url() === proxy.url + path && r.headers()['x-auto-refresh'] === '1');
      await page.clock.runFor(10_000);
      await fetched;
    }
    await page.goto(`${proxy.url}/admin/requests`);
    await page.locator('table.calls').waitFor();
    const before = await page.locator('table.calls tbody tr').count();
    await (await proxy.call(proxy.token)).text();
    await proxy.settled();
    await page.clock.runFor(10_000);
    await page.waitForFunction((n) => document.querySelectorAll('table.calls tbody tr').length > n, before);
    assert.match(await page.locator('time[data-show=clock]').first().getAttribute('title'), / UTC/, 'a refreshed part has local times');

    await page.goto(`${proxy.url}/admin/dashboard`);
    await page.getByText('More periods').first().click();
    await page.getByText('Yesterday', { exact: true }).click();
    await page.waitForURL(/period=yesterday/);
    await page.getByLabel('From').fill('2026-01-01');
    await page.getByLabel('To, inclusive').fill('2026-01-31');
    await page.getByRole('button', { name: 'Apply', exact: true }).click();
    await page.waitForURL(/from=2026-01-01&to=2026-01-31/);
    assert.ok(!page.url().includes('period='), 'dates replace the period');
    await page.goto(`${proxy.url}/admin/requests`);
    await page.getByLabel('Period (UTC)').selectOption('24 hours');
    await page.getByRole('button', { name: 'Apply', exact: true }).click();
    await page.waitForURL(/period=24h/);
    for (const v of [visitor, plain]) {
      await v.end();
    }
  });

  test('the key / leads to the search of a list and, from other pages, of calls', async () => {
    const visitor = await visit();
    const { page } = visitor;
    await (await proxy.call(proxy.token)).text();
    await visitor.signIn();
    for (const [from, to] of [['/admin/tokens', '/admin/tokens'], ['/admin/settings', '/admin/requests#search']]) {
      await page.goto(proxy.url + from);
      await page.keyboard.press('/');
      await page.waitForURL(proxy.url + to);
      await page.waitForFunction(() => document.activeElement.id === 'search');
    }
    await visitor.end();
  });

  test('pointing at a chart shows the numbers of that time in all charts of the page', async () => {
    const plain = await visit({ javaScriptEnabled: false });
    const visitor = await visit({ hasTouch: true });
    const { page } = visitor;
    await (await proxy.call(proxy.token)).text();
    await proxy.settled();
    const path = `${proxy.url}/admin/dashboard?period=24h&by=model`;
    for (const v of [plain, visitor]) {
      await v.page.goto(`${proxy.url}/admin/sign-in`);
      await v.signIn();
      await v.page.goto(path);
    }
    assert.match(await plain.page.locator('.chart .slot title').last().textContent(), /UTC\np50: /);
    assert.equal(await page.locator('.chart .slot title').count(), 0, 'no title covers the numbers');
    const charts = await page.locator('.chart').count(), boxes = page.locator('.readout:visible');
    assert.ok(charts >= 3);
    const slots = page.locator('.chart').first().locator('.slot');
    const lines = () => page.locator('.cross').evaluateAll((all) => all.map((l) => [l.getAttribute('x1'), l.getAttribute('visibility')].join()));
    const inside = () => boxes.evaluateAll((all) => all.every((b) => { const box = b.getBoundingClientRect(); return box.left >= 0 && box.right <= innerWidth; }));

    await slots.last().hover();
    assert.equal(await boxes.count(), charts);
    assert.match(await boxes.first().textContent(), /UTC.*gpt-4o-mini.*\d/s);
    assert.match(await boxes.last().textContent(), /p50[\d.]+ m?sp95/);
    assert.equal(new Set(await lines()).size, 1, 'the line is at the same time in all charts');
    const last = (await lines())[0];
    await slots.nth(3).hover({ force: true });
    assert.notEqual((await lines())[0], last);
    assert.match(await boxes.first().textContent(), /no data/);
    await page.mouse.move(5, 5);
    assert.equal(await boxes.count(), 0);

    await page.locator('.chart').first().focus();
    await page.keyboard.press('End');
    assert.equal(await boxes.count(), charts);
    assert.equal((await lines())[0], last);
    await page.keyboard.press('ArrowLeft');
    assert.notEqual((await lines())[0], last);
    assert.match(await page.locator('.chart').first().getByRole('status').textContent(), /UTC; /);
    assert.deepEqual(await visitor.violations(), []);
    await page.keyboard.press('Escape');
    assert.equal(await boxes.count(), 0);
    await page.keyboard.press('End');
    await page.keyboard.press('Enter');
    await page.waitForURL(/\/admin\/requests\?from=/);

    await page.setViewportSize({ width: 375, height: 700 });
    await page.goto(path);
    await slots.last().tap();
    assert.equal(await boxes.count(), charts);
    assert.ok(await inside());
    assert.equal(page.url(), path, 'the first touch shows the numbers');
    await slots.first().tap();
    assert.ok(await inside());
    await slots.last().tap();
    await slots.last().tap();
    await page.waitForURL(/\/admin\/requests\?from=/);
    for (const v of [visitor, plain]) {
      await v.end();
    }
  });

  test('every page is sound at any width, in light and dark mode', async () => {
    const visitor = await visit();
    const { page } = visitor;
    await page.goto(`${proxy.url}/admin/sign-in`);
    const paths = ['/admin/sign-in'];
    const check = async (path) => {
      const name = path.slice(7).replace(/\?.*/, '').replace(/(proj|tok|key|up|req)_\w+/g, '$1').replaceAll('/', '-');
      await visitor.look(name, async () => assert.equal((await page.goto(proxy.url + path)).status(), 200, path));
    };
    await check('/admin/sign-in');
    await visitor.signIn();
    const key = await proxy.manage('POST', '/manage/keys', { name: 'spare', role: 'viewer' });
    const cache = { ttl_seconds: 3600, when: 'always', endpoints: ['/v1/chat/*'] };
    await proxy.manage('PATCH', `/manage/projects/${proxy.project}`, { policy: { cache } });
    for (const status of ['fwd=miss', 'hit']) {
      const answer = await proxy.call(proxy.token);
      assert.ok(answer.headers.get('cache-status').startsWith(`llm-proxy; ${status}`));
      await answer.text();
      await proxy.settled();
    }
    const hit = await proxy.settled();
    await proxy.manage('PATCH', `/manage/projects/${proxy.project}`, { policy: { cache, limits: [{ count: 'tokens', max: 20, per: 'day' }, { count: 'dollars', max: 5, per: 'month', shadow: true }] } });
    const token = await proxy.manage('POST', '/manage/tokens', { project_id: proxy.project, name: 'a rather long name for a token of somebody', max_requests: 10 });
    await (await proxy.call(token.token)).text();
    const hook = await proxy.manage('POST', '/manage/webhooks', { name: 'ops', format: 'slack', url: 'http://127.0.0.1:1/hook', events: ['token.expiring'] });
    await proxy.manage('POST', `/manage/webhooks/${hook.id}/test`);
    const webhook = `/admin/webhooks/${hook.id}`;
    const project = `/admin/projects/${proxy.project}`, one = `/admin/tokens/${token.id}`;
    const nav = await page.getByRole('navigation', { name: 'Main' }).getByRole('link').evaluateAll((all) => all.map((a) => a.getAttribute('href')));
    paths.push(...nav, project, `${project}/edit`, `${project}/deactivate`, `${project}/upstreams/new`, `/admin/projects/new?like=${proxy.project}`, `/admin/tokens/new?like=${token.id}`, '/admin/tokens/new?preset=public-demo',  `${project}/empty-cache`, one, `${one}/edit`, `${one}/rotate`, `${one}/revoke`,
      '/admin/projects/new', '/admin/tokens/new', '/admin/tokens?name=nobody', '/admin/keys/new', `/admin/keys/${key.id}/edit`, '/admin/prices/new', '/admin/prices?model=gpt-4o-mini', '/admin/prices/list?search=gpt-5', '/admin/prices/simulate?model=gpt-4o-mini&input_tokens=1000',
      '/admin/dashboard?period=24h&measure=tokens&by=model', '/admin/dashboard?period=last-week', `/admin/dashboard?project=${proxy.project}`, `/admin/requests/${(await proxy.settled()).id}`, '/admin/requests?status=x', `/admin/requests/${hit.id}`, '/admin/requests?cache=hit',
      '/admin/webhooks/new', webhook, `${webhook}/edit`, `${webhook}/rotate`, `${webhook}/delete`, '/admin/audit/verify', '/admin/account');
    for (const path of paths.slice(1)) await check(path);
    await visitor.end();
  });
});
