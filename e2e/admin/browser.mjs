// A headless Chromium for the tests of the pages. It collects what a page must never cause: console errors, script
// errors, violations of the content security policy.
import { existsSync, mkdirSync } from 'node:fs';
import { delimiter, join } from 'node:path';
import axe from 'axe-core';
import { chromium } from 'playwright-core';

// chromiumPath is the path of the browser, undefined if it is not installed.
export const chromiumPath = (process.env.PATH ?? '').split(delimiter)
  .flatMap((dir) => ['chromium', 'chromium-browser', 'google-chrome'].map((name) => join(dir, name))).find((file) => existsSync(file));

export const launch = () => chromium.launch({ executablePath: chromiumPath, args: ['--no-sandbox'] });

// A Visitor is a separate browser profile with one open page.
export class Visitor {
  problems = [];

  static async start(browser, url, options = {}) {
    const v = new Visitor();
    v.url = url;
    v.context = await browser.newContext({ viewport: { width: 1280, height: 850 }, permissions: ['clipboard-read', 'clipboard-write'], ...options });
    v.page = await v.context.newPage();
    v.page.setDefaultTimeout(15_000);
    v.page.on('pageerror', (e) => v.problems.push(`${v.page.url()}: ${e.message}`));
    v.page.on('console', (m) => {
      // The browser reports each 4xx response as an error; the tests expect some of them.
      if (['error', 'warning'].includes(m.type()) && !m.text().startsWith('Failed to load resource')) v.problems.push(`${v.page.url()}: ${m.text()}`);
    });
    return v;
  }

  async signIn(key) {
    await this.page.goto(`${this.url}/admin/`);
    await this.page.getByLabel('Management key').fill(key);
    await this.page.getByRole('button', { name: 'Sign in' }).click();
    await this.page.getByRole('navigation', { name: 'Main' }).waitFor();
  }

  // violations returns what axe finds against WCAG 2.1 A and AA and best practice.
  async violations() {
    await this.page.evaluate(axe.source);
    const found = await this.page.evaluate(() => window.axe.run(document, { runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa', 'best-practice'] }));
    return found.violations.map((v) => `${v.impact} ${v.id}: ${v.nodes.map((n) => n.target).slice(0, 3).join(', ')}`);
  }

  // overflow returns by how many pixels the page is wider than the window.
  overflow() {
    return this.page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
  }

  // picture saves a screenshot in the directory LLM_PROXY_PICTURES, if that is set.
  async picture(name) {
    const dir = process.env.LLM_PROXY_PICTURES;
    if (!dir) return;
    mkdirSync(dir, { recursive: true });
    await this.page.screenshot({ path: join(dir, `${name}.png`), fullPage: true });
  }
}
