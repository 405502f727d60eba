// This file notices events that administrators want to hear of, and sends them to their webhooks. One worker looks for
// events and queues them in the database: the mark that it sets decides, so that neither a restart nor another process
// repeats one. Another worker claims and sends them. No call waits for either. The file never sees the text of a
// secret: secrets.go signs, and upstream.go checks each URL and each address that is dialed. What a receiver answers
// is not stored.
package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

// A limitUseState is how much of a limit is used. tokenID is "" for a project's limit.
type limitUseState struct {
	limit                  *limit
	used                   int64
	windowStart, windowEnd int64
	projectID, projectName string
	tokenID, tokenName     string
}

// reached returns the highest threshold that the limit has reached, 0 if none, and a mark for each one it has reached,
// the highest last. A limit whose maximum was changed is another limit. Buckets and limits with for_each have none:
// they are full and empty again within moments, or as numerous as the clients' users.
func (u *limitUseState) reached(now int64) (percent int64, marks []mark) {
	l := u.limit
	if !l.isWindow() || l.forEach != "" || l.max <= 0 {
		return 0, nil
	}
	until := now + lifetimeMarkMS
	if u.windowEnd > 0 && u.windowEnd < neverExpires {
		until = u.windowEnd + dayMS
	}
	for _, p := range limitThresholds() {
		if u.used < l.max/100*p+(l.max%100*p+99)/100 {
			break
		}
		percent = p
		what := mustMarshal([]any{l, u.windowStart})
		marks = append(marks, mark{fmt.Sprintf("limit|%s|%s|%d", cmp.Or(u.tokenID, u.projectID), what, p), until})
	}
	return percent, marks
}

// event describes that the limit has reached a percentage.
func (u *limitUseState) event(percent int64) notificationData {
	owner := "the project " + u.projectName
	if u.tokenID != "" {
		owner = "the token " + u.tokenName + " of " + owner
	}
	e := notificationData{ProjectID: u.projectID, ProjectName: u.projectName, TokenID: u.tokenID,
		TokenName: u.tokenName, Limit: u.limit.String(), Percent: percent, Used: u.limit.valueJSON(u.used),
		Max: u.limit.valueJSON(u.limit.max), Shadow: u.limit.monitorOnly}
	if u.windowEnd > 0 && u.windowEnd < neverExpires {
		e.ResetsAt = new(timestamp(u.windowEnd))
	}
	e.Summary = fmt.Sprintf("%d%% of a limit of %s is used: %s.", percent, owner, e.Limit)
	if percent >= 100 {
		e.Summary = fmt.Sprintf("A limit of %s is used up: %s.", owner, e.Limit)
	}
	return e
}

// A notifier watches for events and delivers notifications. All work is in watch and deliver, which one
// goroutine each runs; test and redeliver come from administrators.
type notifier struct {
	store        *store
	sealer       *sealer
	limits       *limitState
	registry     *registry
	ledger       *ledger
	log          *slog.Logger
	transport    http.RoundTripper
	allowPrivate bool

	wake        chan struct{}        // there may be something to deliver
	foreignRows chan foreignRowError // rows that were refused; more than fit are dropped
	active      atomic.Bool          // there are webhooks

	// Only watch uses these.
	hooks    []webhookRow        // the active ones, as last read
	noticed  map[string]struct{} // marks that are set in the database, as far as known
	until    notifiedUntil
	slowAt   int64         // when it last looked for what need not be noticed within seconds
	isIdle   bool          // there is no active webhook, and the database knows
	alarm    *notification // about the ledger; nil: none, or it is queued
	directAt int64         // when the alarm was last sent past the queue
}

func newNotifier(sl *sealer, ls *limitState, log *slog.Logger, rt http.RoundTripper, allowPrivate bool) *notifier {
	return &notifier{store: ls.store, sealer: sl, limits: ls, registry: ls.registry, ledger: ls.ledger, log: log,
		transport: rt, allowPrivate: allowPrivate, wake: make(chan struct{}, 1),
		foreignRows: make(chan foreignRowError, 64), noticed: map[string]struct{}{}}
}

// reportForeignRow notices a row that is refused. n may be nil, while the program starts.
func (n *notifier) reportForeignRow(e *foreignRowError) {
	if n == nil {
		return
	}
	select {
	case n.foreignRows <- *e:
	default:
	}
}

// watch looks for events until ctx is done.
func (n *notifier) watch(ctx context.Context) {
	tick := time.NewTicker(notifyInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if err := n.check(ctx, n.now()); err != nil && ctx.Err() == nil && n.ledger.healthy() {
				n.log.Warn("events for webhooks could not be looked for", "error", err)
			}
		}
	}
}

// check looks for events once. now is by the clock of limits: no window may begin before it does for calls.
func (n *notifier) check(ctx context.Context, now int64) error {
	all, err := n.store.listWebhooks(ctx)
	if err == nil {
		n.hooks = slices.DeleteFunc(slices.Clone(all), func(w webhookRow) bool { return !w.active })
		n.active.Store(len(n.hooks) > 0)
	}
	n.checkLedger(ctx, now)
	if err != nil {
		return err
	}
	isSlow := now-n.slowAt >= slowNotifyInterval
	if isSlow {
		n.slowAt = now
		err = n.store.pruneWebhooks(ctx, now, all)
	}
	if len(n.hooks) == 0 {
		if !n.isIdle { // also after a start: the process before may have ended before it noticed
			n.until = notifiedUntil{}
			err = errors.Join(err, n.store.forgetNotified(ctx))
			n.isIdle = err == nil
		}
		return err
	}
	if n.isIdle = false; n.until.At == 0 {
		if err := n.begin(ctx, now); err != nil {
			return err
		}
	}
	before := n.until.Audit
	err = errors.Join(err, n.checkLiveLimits(ctx, now), n.checkForeignRows(ctx, now), n.checkTrail(ctx, now))
	if isSlow {
		err = errors.Join(err, n.checkErrorShare(ctx, now), n.checkExpiry(ctx, now))
	} else if n.until.Audit == before {
		return err
	}
	return errors.Join(err, n.store.setNotifiedUntil(ctx, n.until))
}

// now returns the time by the clock that limits and all replicas share.
func (n *notifier) now() int64 { return n.limits.now(time.Now()) }

// begin goes on where an earlier process ended, and otherwise starts with what happens from now on.
func (n *notifier) begin(ctx context.Context, now int64) error {
	until, err := n.store.notifiedUntil(ctx)
	if errors.Is(err, errNotFound) {
		head, _, newest, err := n.store.loadAuditHead(ctx, n.store.chain)
		if err != nil {
			return err
		}
		n.until = notifiedUntil{Audit: max(head.seq, newest), At: now}
		return n.store.setNotifiedUntil(ctx, n.until)
	}
	if err == nil {
		// Calls that ended just before the earlier process did may have reached a limit; long ones began long before.
		err = n.checkStoredLimits(ctx, now, minIDAt(time.UnixMilli(until.At-hourMS)))
	}
	if err == nil {
		n.until = until
	}
	return err
}

// emit queues a notification for the webhooks that list its type, unless the last of marks was set before. only
// restricts them further; it may be nil.
func (n *notifier) emit(ctx context.Context, now int64, eventType string, data notificationData, marks []mark,
	only func(*webhookRow) bool) error {
	key := marks[len(marks)-1].key
	if _, known := n.noticed[key]; known {
		return nil
	}
	to := listeningTo(eventType, n.hooks, only)
	if len(to) == 0 {
		return nil
	}
	msg := newNotification(eventType, now, data)
	_, err := n.store.addNotification(ctx, msg, marks, to, now+deliveryGiveUpMS, newDeliveryID)
	if err != nil {
		return err
	}
	n.wakeUp()
	if len(n.noticed) >= maxNoticed {
		clear(n.noticed) // the database remembers
	}
	n.noticed[key] = struct{}{}
	return nil
}

func newNotification(eventType string, now int64, data notificationData) *notification {
	return &notification{id: newID("msg"), eventType: eventType, at: now, data: string(mustMarshal(data))}
}

func newDeliveryID() string { return newID("del") }

func (n *notifier) wakeUp() {
	select {
	case n.wake <- struct{}{}:
	default: // it is awake already
	}
}

// liveTokens returns the tokens that are in memory.
func (g *registry) liveTokens() []*liveToken {
	g.mu.RLock()
	defer g.mu.RUnlock()
	return slices.Collect(maps.Values(g.byID))
}

// checkLiveLimits looks at the limits of the tokens and projects in memory: no other one can have changed.
func (n *notifier) checkLiveLimits(ctx context.Context, now int64) error {
	var errs []error
	for _, t := range n.registry.liveTokens() {
		st, p := t.state.Load(), t.project.state.Load()
		if t.validity(st, now) == "revoked" || st.maxRequests < 0 && len(st.policy.Limits) == 0 {
			continue
		}
		uses := n.limits.liveUses(t.project, t, now)
		if st.maxRequests > 0 {
			lifetime := &limit{metric: metricRequests, period: perLifetime, max: st.maxRequests}
			uses = append(uses, limitUseState{limit: lifetime, used: t.used.Load()})
		}
		errs = append(errs, n.emitLimits(ctx, now, uses, [2]string{p.id, p.name}, [2]string{st.id, st.name}))
	}
	for _, lp := range n.registry.liveProjects() {
		if p := lp.state.Load(); len(p.policy.Limits) > 0 {
			uses := n.limits.liveUses(lp, nil, now)
			errs = append(errs, n.emitLimits(ctx, now, uses, [2]string{p.id, p.name}, [2]string{}))
		}
	}
	return errors.Join(errs...)
}

// liveUses returns the use of the limits of a token, or of its project if t is nil. If they cannot be read now, it
// returns none.
func (ls *limitState) liveUses(p *liveProject, t *liveToken, now int64) []limitUseState {
	p.limiter.mu.Lock()
	defer p.limiter.mu.Unlock()
	if t == nil && ls.syncProjectLimits(p, now) == nil {
		return limitUses(p.limiter.project.counters, now)
	}
	if t != nil && ls.syncLimits(t, now) == nil {
		return limitUses(t.limits.counters, now)
	}
	return nil
}

func limitUses(counters []*limitCounter, now int64) (uses []limitUseState) {
	for _, c := range counters {
		if c.advance(now); c.limit.isWindow() && c.group == nil {
			uses = append(uses, limitUseState{limit: c.limit, used: c.unscaledUse(), windowStart: c.windowStart,
				windowEnd: c.windowEnd})
		}
	}
	return uses
}

// emitLimits notifies of limits that have reached a threshold. project and token are ids and names.
func (n *notifier) emitLimits(ctx context.Context, now int64, uses []limitUseState, project, token [2]string) error {
	var errs []error
	for i := range uses {
		u := &uses[i]
		u.projectID, u.projectName, u.tokenID, u.tokenName = project[0], project[1], token[0], token[1]
		percent, marks := u.reached(now)
		if percent > 0 {
			errs = append(errs, n.emit(ctx, now, eventLimit, u.event(percent), marks, nil))
		}
	}
	return errors.Join(errs...)
}

// checkStoredLimits looks at the limits of tokens that are not in memory, and of their projects, if they have made
// calls since one with an id.
func (n *notifier) checkStoredLimits(ctx context.Context, now, since int64) error {
	used, err := n.store.tokensUsedSince(ctx, since, maxUsedTokens)
	if err != nil {
		return err
	}
	var errs []error
	projects := map[string]*projectRow{}
	for _, u := range used {
		p := projects[u.project]
		if p == nil {
			row, err := n.store.projectByID(ctx, u.project)
			if err != nil {
				continue // deleted meanwhile, or refused
			}
			p, projects[u.project] = &row, &row
			counters, err := n.limits.storedCounters(ctx, p.policy, true, p.seq, 0, now)
			uses := limitUses(counters, now)
			errs = append(errs, err, n.emitLimits(ctx, now, uses, [2]string{p.id, p.name}, [2]string{}))
		}
		t, err := n.store.tokenByID(ctx, u.id)
		if err != nil {
			continue
		}
		counters, err := n.limits.storedCounters(ctx, t.policy, false, t.project, t.seq, now)
		uses := limitUses(counters, now)
		if t.maxRequests != nil {
			lifetime := &limit{metric: metricRequests, period: perLifetime, max: *t.maxRequests}
			uses = append(uses, limitUseState{limit: lifetime, used: t.requestCount})
		}
		errs = append(errs, err, n.emitLimits(ctx, now, uses, [2]string{p.id, p.name}, [2]string{t.id, t.name}))
	}
	return errors.Join(errs...)
}

// checkForeignRows notifies of rows that were refused since the last check.
func (n *notifier) checkForeignRows(ctx context.Context, now int64) error {
	for range cap(n.foreignRows) {
		select {
		case e := <-n.foreignRows:
			if err := n.emitAuditProblem(ctx, now, e.Error()); err != nil {
				return err
			}
		default:
			return nil
		}
	}
	return nil
}

// emitAuditProblem notifies of a problem of the audit trail or of a row that it covers, once in keepNotifications.
func (n *notifier) emitAuditProblem(ctx context.Context, now int64, problem string) error {
	problem = clip(problem, 500)
	data := notificationData{Problem: problem, Summary: "The database was changed outside llm-proxy: " + problem + "."}
	return n.emit(ctx, now, eventAudit, data, []mark{{"audit|" + problem, now + keepNotifications}}, nil)
}

// checkTrail reads the entries of the audit trail that are new, checks them, and notifies of those that matter.
func (n *notifier) checkTrail(ctx context.Context, now int64) error {
	head, ok, newest, err := n.store.loadAuditHead(ctx, n.store.chain)
	if err != nil {
		return err
	}
	if !ok || newest > head.seq || head.seq > newest || newest < n.until.Audit {
		err := n.emitAuditProblem(ctx, now, "the last entries of the audit trail are missing or were changed")
		if err != nil || newest <= n.until.Audit {
			return err
		}
	}
	for n.until.Audit < newest {
		// The last entry that was read before comes first, for the chain.
		page, err := n.store.auditPage(ctx, max(n.until.Audit-1, 0), newest)
		if err != nil || len(page) == 0 {
			return err
		}
		check := auditCheck{chain: n.store.chain, lastHead: auditHead{max(n.until.Audit-1, 0), page[0].prev}}
		for i := range page {
			check.add(&page[i])
			if e := &page[i]; e.seq > n.until.Audit {
				if err := n.emitEntry(ctx, now, e); err != nil {
					return err
				}
				n.until.Audit = e.seq
			}
		}
		for _, problem := range check.problems {
			if err := n.emitAuditProblem(ctx, now, problem); err != nil {
				return err
			}
		}
		if len(page) < auditPageSize {
			return nil
		}
	}
	return nil
}

// emitEntry notifies of what an entry of the audit trail records, if it matters.
func (n *notifier) emitEntry(ctx context.Context, now int64, e *auditEntry) error {
	marks := []mark{{fmt.Sprintf("entry|%d|%d", e.seq, e.at), now + keepNotifications}}
	switch e.action {
	case "upstream.health":
		var detail struct{ State [2]string }
		_ = json.Unmarshal([]byte(e.detail), &detail) // the program wrote it
		eventType, text := eventExhausted, "has no credit or quota left"
		switch detail.State[1] {
		case keyExhausted.String():
		case keyQuarantined.String():
			eventType, text = eventRefused, "is refused by the provider, or cannot be used as it is stored"
		default:
			return nil
		}
		u, err := n.store.namedUpstream(ctx, e.object)
		if err != nil && !errors.Is(err, errNotFound) {
			return err
		}
		data := notificationData{UpstreamID: e.object, UpstreamName: u.name, ProjectID: u.projectID,
			ProjectName: u.projectName}
		data.Summary = fmt.Sprintf("The provider key %s of the project %s %s.", u.name, u.projectName, text)
		return n.emit(ctx, now, eventType, data, marks, nil)
	case actionSignIn:
		known, err := n.store.signedInBefore(ctx, e, e.at-knownAddressDays*dayMS)
		if err != nil || known {
			return err
		}
		name := "MANAGEMENT_TOKEN"
		if e.actorID != actorEnvironment {
			if k, err := n.store.managementKeyByID(ctx, e.actorID); err == nil {
				name = k.name
			}
		}
		return n.emit(ctx, now, eventNewAddress, notificationData{KeyID: e.actorID, KeyName: name, Address: e.address,
			Summary: "The management key " + name + " signed in from a new address, " + e.address + "."}, marks, nil)
	}
	return nil
}

// checkExpiry notifies of tokens that will expire, at the moment when 7 days or 1 day are left: not when a token is
// made for less. If both have passed since the last check, the second counts.
func (n *notifier) checkExpiry(ctx context.Context, now int64) error {
	for _, c := range [...]struct{ days, atLeast int64 }{{7, 1}, {1, 0}} {
		left := c.days * dayMS
		after := expiringToken{seq: math.MaxInt64, expiresAt: max(n.until.At+left, now+c.atLeast*dayMS)}
		for {
			tokens, err := n.store.expiringTokens(ctx, after, now+left+1, expiringAtOnce)
			if err != nil {
				return err
			}
			for _, t := range tokens {
				if after = t; t.createdAt > t.expiresAt-left-slowNotifyInterval {
					continue
				}
				marks := []mark{{fmt.Sprintf("expiry|%s|%d|%d", t.id, t.expiresAt, c.days), t.expiresAt + dayMS}}
				if err := n.emit(ctx, now, eventExpiry, t.event(now), marks, nil); err != nil {
					return err
				}
			}
			if len(tokens) < expiringAtOnce {
				break
			}
		}
	}
	n.until.At = max(n.until.At+1, now)
	return nil
}

// checkErrorShare notifies of projects whose calls fail, by the hour. Calls at its end are looked at in the next one.
func (n *notifier) checkErrorShare(ctx context.Context, now int64) error {
	var errs []error
	for _, lp := range n.registry.liveProjects() {
		p, before := lp.state.Load(), now-2*slowNotifyInterval
		for hour := before - before%hourMS; hour <= now; hour += hourMS {
			errs = append(errs, n.checkErrorsOf(ctx, now, p, hour))
		}
	}
	return errors.Join(errs...)
}

// checkErrorsOf notifies of the calls of a project in an hour that failed, at each percentage that a webhook names.
func (n *notifier) checkErrorsOf(ctx context.Context, now int64, p *projectState, hour int64) error {
	sum, err := n.store.sumHours(ctx, p.seq, hour, hour+hourMS)
	failed := sum.failed()
	if err != nil || sum.calls < minErrorCalls {
		return err
	}
	share := 100 * failed / sum.calls
	data := notificationData{ProjectID: p.id, ProjectName: p.name, Percent: share, Calls: sum.calls, Errors: failed,
		Summary: fmt.Sprintf("%d%% of the calls of the project %s in the hour from %s have failed: %d of %d.",
			share, p.name, time.UnixMilli(hour).UTC().Format("15:04 UTC"), failed, sum.calls)}
	var errs []error
	for i := range n.hooks {
		percent := n.hooks[i].errorPercent
		if share < percent {
			continue
		}
		marks := []mark{{fmt.Sprintf("errors|%s|%d|%d", p.id, hour, percent), hour + dayMS}}
		errs = append(errs, n.emit(ctx, now, eventErrors, data, marks,
			func(w *webhookRow) bool { return w.errorPercent == percent }))
	}
	return errors.Join(errs...)
}

// checkLedger notifies if the ledger cannot be written. Then the queue cannot either, as a rule: the notification is
// sent to each webhook at once, every minute, and queued as soon as the ledger can be written again.
func (n *notifier) checkLedger(ctx context.Context, now int64) {
	healthy := n.ledger.healthy()
	if !healthy && n.alarm == nil {
		n.alarm, n.directAt = newNotification(eventLedger, now, notificationData{
			Summary: "The ledger cannot be written: calls are refused until it can."}), 0
	}
	if n.alarm == nil {
		return
	}
	to := listeningTo(eventLedger, n.hooks, nil)
	if healthy {
		marks := []mark{{"ledger|" + n.alarm.id, now + keepNotifications}}
		if _, err := n.store.addNotification(ctx, n.alarm, marks, to, now+deliveryGiveUpMS, newDeliveryID); err == nil {
			n.alarm = nil
			n.wakeUp()
		}
		return
	}
	if now-n.directAt < slowNotifyInterval {
		return
	}
	n.directAt = now
	var sending sync.WaitGroup
	defer sending.Wait()
	for i := range to {
		sending.Go(func() { n.send(ctx, &to[i], n.alarm) })
	}
}

// deliver sends what is queued, until ctx is done. Each webhook has one goroutine at a time, so that one that is slow
// keeps no other waiting.
func (n *notifier) deliver(ctx context.Context) {
	var sending sync.WaitGroup
	defer sending.Wait()
	var mu sync.Mutex
	busy := map[int64]bool{} // by webhook
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		case <-n.wake:
		}
		if !n.active.Load() {
			continue
		}
		hooks, err := n.store.listWebhooks(ctx)
		if err != nil {
			continue // the other worker reports it
		}
		for i := range hooks {
			w := &hooks[i]
			mu.Lock()
			skip := busy[w.seq] || !w.active
			busy[w.seq] = busy[w.seq] || !skip
			mu.Unlock()
			if skip {
				continue
			}
			sending.Go(func() {
				n.deliverTo(ctx, w)
				mu.Lock()
				defer mu.Unlock()
				delete(busy, w.seq)
			})
		}
	}
}

// deliverTo sends what is due to a webhook.
func (n *notifier) deliverTo(ctx context.Context, w *webhookRow) {
	due, err := n.store.dueDeliveries(ctx, w.seq, n.now(), deliveriesAtOnce)
	for i := 0; i < len(due) && err == nil && ctx.Err() == nil; i++ {
		err = n.attempt(ctx, w, &due[i])
	}
	if err != nil && ctx.Err() == nil {
		n.log.Warn("a delivery could not be recorded; it will be repeated", "webhook", w.id, "error", err)
	}
}

// attempt sends a delivery, unless another process does, or the webhook has been changed: then it is soon read anew.
func (n *notifier) attempt(ctx context.Context, w *webhookRow, d *deliveryRow) error {
	now := n.now()
	if ok, err := n.store.claimDelivery(ctx, w, d, now, now+deliveryLeaseMS); !ok || err != nil {
		return err
	}
	return n.sendClaimed(ctx, w, d)
}

// sendClaimed sends a delivery that this process has claimed, and records the result.
func (n *notifier) sendClaimed(ctx context.Context, w *webhookRow, d *deliveryRow) error {
	res := n.send(ctx, w, &d.of)
	if res.problem == "" || ctx.Err() == nil { // otherwise this process ends, which says nothing of the receiver
		d.record(res, n.now(), rand.Float64())
	}
	if d.state == deliveryFailed {
		n.log.Warn("a notification could not be delivered", "webhook", w.id, "delivery", d.id, "problem", d.problem)
	}
	return n.store.saveDelivery(context.WithoutCancel(ctx), d)
}

// send makes one request to a webhook.
func (n *notifier) send(ctx context.Context, w *webhookRow, msg *notification) deliveryResult {
	ending := ctx
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), deliveryTimeout)
	defer cancel()
	// A stop waits a moment for the answer: without it, the notification is sent again.
	stop := context.AfterFunc(ending, func() { time.AfterFunc(deliveryStopWait, cancel) })
	defer stop()
	now := time.Now()
	body, err := notificationBody(w.format, msg)
	if err != nil {
		return deliveryResult{problem: "the notification cannot be read", final: true}
	}
	req, err := n.newRequest(ctx, w, msg.id, body, now)
	if err != nil {
		return deliveryResult{problem: "the URL or the secret cannot be used as it is stored", final: true}
	}
	res, err := n.transport.RoundTrip(req) // which follows no redirect
	switch {
	case err != nil && errors.Is(err, errForbiddenAddress):
		return deliveryResult{problem: "resolves to an address that is not allowed"}
	case err != nil && ctx.Err() != nil:
		return deliveryResult{problem: "did not answer in time"}
	case err != nil && isDialError(err):
		return deliveryResult{problem: "could not be reached"}
	case err != nil:
		return deliveryResult{problem: "the connection failed, or its certificate is not valid"}
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 64<<10)) // its text is of no interest
	out := deliveryResult{status: res.StatusCode, final: res.StatusCode == http.StatusGone}
	if res.StatusCode < 200 || res.StatusCode > 299 {
		text := strconv.Itoa(res.StatusCode) + " " + http.StatusText(res.StatusCode)
		out.problem = "answered " + strings.TrimSpace(text)
		if seconds, err := strconv.ParseInt(res.Header.Get("Retry-After"), 10, 64); err == nil && seconds > 0 {
			out.wait = min(seconds, deliveryLastWait/1000) * 1000
		}
	}
	return out
}

// newRequest makes the request of a delivery, with the headers of Standard Webhooks.
func (n *notifier) newRequest(ctx context.Context, w *webhookRow, id string, body []byte, now time.Time,
) (*http.Request, error) {
	target, err := n.sealer.open(w.sealedURL, webhookContext(w.id, webhookURLPart))
	if err != nil {
		return nil, err
	}
	u, err := parseWebhookURL(target, n.allowPrivate)
	if err != nil {
		return nil, err
	}
	current, err := n.sealer.open(w.sealedSecret, webhookContext(w.id, webhookSecretPart))
	if err != nil {
		return nil, err
	}
	secrets := []secret{current}
	if len(w.oldSecret) > 0 && now.UnixMilli() < deref(w.oldSecretUntil) {
		old, err := n.sealer.open(w.oldSecret, webhookContext(w.id, webhookOldSecretPart))
		if err != nil {
			return nil, err
		}
		secrets = append(secrets, old)
	}
	timestamp := strconv.FormatInt(now.Unix(), 10)
	signature, err := signWebhook(secrets, id, timestamp, body)
	if err != nil {
		return nil, err
	}
	req := &http.Request{Method: http.MethodPost, URL: u, Host: u.Host, Header: http.Header{
		"Content-Type": {"application/json"}, "User-Agent": {"llm-proxy"}, "Webhook-Id": {id},
		"Webhook-Timestamp": {timestamp}, "Webhook-Signature": {signature}},
		Body: io.NopCloser(bytes.NewReader(body)), ContentLength: int64(len(body))}
	return req.WithContext(ctx), nil
}
