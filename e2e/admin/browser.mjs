// This file sets up the tests of the pages: a server, and a headless Chromium that collects what a page must never cause:
// console errors, script errors, violations of the content security policy. Without Chromium the tests are skipped.
import assert from 'node:assert/strict';
import { existsSync, mkdirSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import { after, before, describe } from 'node:test';
import axe from 'axe-core';
import { chromium } from 'playwright-core';

// chromiumPath is the path of the browser, undefined if it is not installed.
const chromiumPath = (process.env.PATH ?? '').split(delimiter)
  .flatMap((dir) => ['chromium', 'chromium-browser', 'google-chrome'].map((name) => join(dir, name))).find((file) => existsSync(file));

export const launch = () => chromium.launch({ executablePath: chromiumPath, args: ['--no-sandbox'] });

// describePages describes the pages of a server, a Proxy or a Demo, which runs during the tests. define gets the server, and a
// function that starts a visitor, with options of the browser's context.
export function describePages(name, server, define) {
  describe(name, { skip: chromiumPath ? false : 'chromium is not installed' }, () => {
    let browser;
    before(async () => {
      await server.start();
      browser = await launch();
    });
    after(async () => {
      await browser?.close();
      await server.stop();
    });
    define(server, (options) => Visitor.start(browser, server, options));
  });
}

// A Visitor is a separate browser profile with one open page.
export class Visitor {
  problems = [];

  static async start(browser, server, options = {}) {
    const v = new Visitor();
    v.server = server;
    v.context = await browser.newContext({ viewport: { width: 1280, height: 850 }, permissions: ['clipboard-read', 'clipboard-write'], ...options });
    v.page = await v.context.newPage();
    v.page.setDefaultTimeout(60_000); // on a busy machine, too, only a hang takes longer
    v.page.on('pageerror', (e) => v.problems.push(`${v.page.url()}: ${e.message}`));
    v.page.on('console', (m) => {
      // The browser reports each 4xx response as an error; the tests expect some of them.
      if (['error', 'warning'].includes(m.type()) && !m.text().startsWith('Failed to load resource')) v.problems.push(`${v.page.url()}: ${m.text()}`);
    });
    return v;
  }

  // end fails if a page had a problem.
  async end() {
    assert.deepEqual(this.problems, []);
    await this.context.close();
  }

  async signIn() {
    await this.page.goto(`${this.server.url}/admin/`);
    await this.page.getByLabel('Management key').fill(this.server.managementToken);
    await this.page.getByRole('button', { name: 'Sign in' }).click();
    await this.page.getByRole('navigation', { name: 'Main' }).waitFor();
  }

  // violations returns what axe finds against WCAG 2.1 A and AA and best practice.
  async violations() {
    if (!await this.page.evaluate(() => 'axe' in window)) await this.page.evaluate(axe.source);
    const found = await this.page.evaluate(() => window.axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'] }));
    return found.violations.map((v) => `${v.impact} ${v.id}: ${v.nodes.map((n) => n.target).slice(0, 3).join(', ')}`);
  }

  // overflow returns by how many pixels the page is wider than the window.
  overflow() {
    return this.page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  }

  // look checks the page that is open at two widths, in light and dark mode. open, if there is one, opens it at each width.
  async look(name, open = () => {}) {
    for (const [width, height] of [[1280, 850], [375, 760]]) {
      await this.page.setViewportSize({ width, height });
      await open();
      for (const colorScheme of ['light', 'dark']) {
        await this.page.emulateMedia({ colorScheme });
        const what = `${name} ${width} ${colorScheme}`;
        assert.deepEqual(await this.violations(), [], what);
        assert.ok(await this.overflow() <= 0, `${what} is wider than the window`);
        await this.picture(`${name}-${width}-${colorScheme}`);
      }
    }
    await this.page.setViewportSize({ width: 1280, height: 850 });
  }

  // picture saves a screenshot in the directory LLM_PROXY_PICTURES, if that is set. Of a very long page it has the beginning.
  async picture(name) {
    const dir = process.env.LLM_PROXY_PICTURES;
    if (!dir) return;
    mkdirSync(dir, { recursive: true });
    const { width, height } = await this.page.evaluate(() => ({ width: innerWidth, height: document.documentElement.scrollHeight }));
    await this.page.screenshot({ path: join(dir, `${name}.png`), fullPage: true, clip: { x: 0, y: 0, width, height: Math.min(height, 8000) }, timeout: 60_000 });
  }
}
