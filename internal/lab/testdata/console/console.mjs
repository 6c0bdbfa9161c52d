// Looks at the console of a KME node in a headless Chromium, as an operator would.
//   node console.mjs URL PROFILE STRANGER SHOTS APPROVAL
// PROFILE is a folder with the operator's cert.pem and key.pem, STRANGER one with an SAE's;
// screenshots go to SHOTS.
// APPROVAL is the operator's own, for letting in carol again, which olga has approved.
import { createRequire } from "node:module";
import { readFileSync } from "node:fs";
import assert from "node:assert/strict";
import { chromium } from "playwright-core";

const axe = readFileSync(createRequire(import.meta.url).resolve("axe-core/axe.min.js"), "utf8");
const [url, operator, stranger, shots, approval] = process.argv.slice(2);
const browser = await chromium.launch({ executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium", args: ["--no-sandbox"] });

// open gives a page of an operator whose system is light or dark. Scripts that the page
// does not have itself are kept out by its policy: axe comes in beside it.
async function open(colorScheme, width = 1280, profile = operator) {
  const context = await browser.newContext({
    colorScheme, viewport: { width, height: 900 }, ignoreHTTPSErrors: true,
    clientCertificates: profile ? [{ origin: url, certPath: `${profile}/cert.pem`, keyPath: `${profile}/key.pem` }] : [],
  });
  const page = await context.newPage();
  page.complaints = [];
  page.on("console", (m) => { if (m.type() === "error") page.complaints.push(m.text()); });
  page.on("pageerror", (e) => page.complaints.push(String(e)));
  page.loads = [];
  page.on("response", (r) => {
    if (!r.url().includes("/events")) page.loads.push(r.body().then((b) => b.length, () => 0));
  });
  return page;
}

// judge has axe look for what people with a screen reader, a keyboard or weak eyes meet.
async function judge(page, what) {
  const session = await page.context().newCDPSession(page);
  await session.send("Runtime.evaluate", { expression: axe });
  const { result } = await session.send("Runtime.evaluate", {
    expression: `axe.run(document, {runOnly: ["wcag2a", "wcag2aa", "wcag21aa", "wcag22aa", "best-practice"]}).then((r) => JSON.stringify(r.violations.map((v) => [v.id, v.help, v.nodes.map((n) => n.html)])))`,
    awaitPromise: true, returnByValue: true,
  });
  assert.deepEqual(JSON.parse(result.value), [], `${what}: axe`);
}

try {
  for (const scheme of ["light", "dark"]) {
    const page = await open(scheme);
    const views = ["/console/", "/console/?range=month", "/console/saes", "/console/acts/disable?sae=carol", "/console/keks", "/console/audit", "/console/audit?action=start", "/console/acts", "/console/acts/cleanup", "/console/acts/reload", "/console/acts/enable?sae=carol", "/console/approvals"];
    for (const [i, view] of views.entries()) {
      page.loads.length = 0;
      await page.goto(url + view, { waitUntil: "load" });
      const painted = await page.waitForFunction(() => performance.getEntriesByName("first-contentful-paint")[0]?.startTime); // may come after load
      const first = await painted.jsonValue();
      if (view.startsWith("/console/?") || view === "/console/") await page.getByText(/^live$/).waitFor();
      await judge(page, `${view} (${scheme})`);
      const weight = (await Promise.all(page.loads)).reduce((a, b) => a + b, 0);
      assert.ok(weight > 500 && weight < 200_000, `${view} weighs ${weight}`);
      await page.screenshot({ path: `${shots}/${i}-${scheme}.png`, fullPage: true });
      console.log(`${view} ${scheme}: ${weight} bytes, first paint after ${Math.round(first)} ms`);
    }
    assert.deepEqual(page.complaints, [], "the browser's console");
    await page.context().close();
  }

  // It is live: a block that comes changes the page, which was not loaded again.
  const page = await open("light");
  await page.goto(url + "/console/");
  const blocks = page.locator("dl.figures div", { hasText: "blocks, given up" }).first().locator("dd");
  const before = await blocks.textContent();
  await page.waitForFunction(([was]) => [...document.querySelectorAll("dl.figures div")].some((d) => d.textContent.includes("blocks, given up") && !d.textContent.includes(was)), [before], { timeout: 60_000 });

  // By the keyboard alone: past the menu to the content, and an act to its end.
  await page.goto(url + "/console/acts");
  await page.keyboard.press("Tab");
  assert.equal(await page.evaluate(() => document.activeElement.textContent), "Skip to the content");
  await page.keyboard.press("Enter");
  await page.keyboard.press("Tab");
  await page.keyboard.press("Enter");
  await page.getByRole("heading", { name: "End overdue keys?" }).waitFor();
  await page.getByRole("button", { name: "End overdue keys" }).focus();
  await page.keyboard.press("Enter");
  await page.getByRole("status").filter({ hasText: "overdue keys were ended" }).waitFor();
  assert.deepEqual(page.complaints, [], "the browser's console");

  await page.goto(url + "/console/acts/reload");
  await page.getByRole("button", { name: "Read policies anew" }).click();
  await page.getByRole("status").filter({ hasText: "policies in force have the digest" }).waitFor();
  assert.deepEqual(page.complaints, [], "the browser's console");

  // An SAE's certificate opens nothing here, nor does none.
  for (const [who, profile] of [["an SAE", stranger], ["nobody", null]]) {
    const refused = await open("light", 1280, profile);
    const why = await refused.goto(url + "/console/").then((page) => page.text(), String);
    assert.match(why, /net::ERR_|client-certificate error/, `${who} is let in`); // the second is what Playwright shows in its place
    assert.doesNotMatch(why, /Alarms/);
    await refused.context().close();
  }

  // Shut out by one officer, and let in again by two: the word of one waits here.
  await page.goto(url + "/console/saes");
  await page.getByRole("link", { name: "Shut out carol" }).click();
  await page.getByLabel("Reason, for the record").fill("lost laptop");
  await page.getByRole("button", { name: "Shut out" }).click();
  await page.getByRole("status").filter({ hasText: "carol is shut out" }).waitFor();
  await judge(page, "what was done");
  await page.getByRole("link", { name: "Go on" }).click();
  await page.getByRole("row", { name: /carol.*shut out.*root: lost laptop/ }).waitFor();
  await judge(page, "an SAE that is shut out");
  const lettingIn = async () => {
    await page.goto(url + "/console/approvals");
    await page.getByRole("link", { name: "Have it done: enable-sae carol" }).click();
    await page.getByText("olga has approved it").waitFor();
  };
  await lettingIn();
  await page.screenshot({ path: `${shots}/second.png`, fullPage: true });
  await judge(page, "an act that another officer has approved");
  await page.getByRole("button", { name: "Let in again" }).click();
  await page.getByRole("alert").filter({ hasText: "two officers" }).waitFor();
  await judge(page, "what was refused");
  assert.match(page.complaints.splice(0).join(), /^[^,]*\b403\b[^,]*$/); // that, and nothing else
  await lettingIn();
  await page.getByLabel("What it says").fill(approval);
  await page.getByRole("button", { name: "Let in again" }).click();
  await page.getByRole("status").filter({ hasText: "carol is let in again" }).waitFor();
  await page.goto(url + "/console/approvals");
  await page.getByText("Nothing waits for a second officer").waitFor();

  // What the audit says of it, and the proof of that.
  const leaf = page.getByRole("link", { name: /^leaf / });
  for (let tries = 0; await leaf.count() === 0; tries++) {
    assert.ok(tries < 60, "the event is not in the tree");
    await page.goto(url + "/console/audit");
    await page.getByLabel("Operator").fill("root");
    await page.getByLabel("Action").selectOption("enable");
    await page.getByRole("button", { name: "Search" }).click();
    await page.getByRole("heading", { name: "Found" }).waitFor();
    await page.waitForTimeout(500); // a second or so until the sequencer has it
  }
  await judge(page, "what was found");
  const [proof] = await Promise.all([page.waitForEvent("download"), leaf.first().click()]);
  assert.match(proof.suggestedFilename(), /^proof-\d+\.json$/);
  assert.deepEqual(page.complaints, [], "the browser's console");

  // A narrow screen scrolls in one direction only.
  const narrow = await open("light", 380);
  await narrow.goto(url + "/console/");
  assert.ok(await narrow.evaluate(() => document.documentElement.scrollWidth <= innerWidth), "the page is wider than a telephone");
  await narrow.screenshot({ path: `${shots}/narrow.png`, fullPage: true });
} finally {
  await browser.close();
}
