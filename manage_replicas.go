// This file is what administrators see of several replicas, and what replicas do for each other: it puts the changes
// in force that administrators made at another replica, and answers another's questions about its running calls. With
// SQLite there is one process, and it only says so. It also erases end users, because every replica has to forget them,
// and finds the names that one has in the ledger. It writes nothing but the audit trail itself.
package main

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strings"
	"time"
)

// pendingUpdates are what changes in the audit trail make necessary, each once.
type pendingUpdates struct {
	everything bool
	projects   bool // those whose version is another
	prices     bool
	tokens     []string   // ids
	emptied    []string   // ids of projects whose tokens were all revoked
	purges     []purgedOf // cached answers
}

// A purgedOf says which cached answers of a project are gone.
type purgedOf struct {
	project string
	filter  cacheFilter
}

// applyChanges puts changes in force that were made at other replicas; changes of this one are applied again, which has
// no effect. What cannot be read any more is inactive or revoked. After any other error the caller repeats it.
func (ops *operations) applyChanges(ctx context.Context, changes []auditChange) error {
	ops.registry.forgetUnknown()
	var todo pendingUpdates
	for i := range changes {
		ops.addUpdates(&todo, &changes[i])
	}
	if todo.everything {
		todo.projects, todo.prices = true, true
		todo.emptied, todo.tokens = nil, nil
		for _, p := range ops.registry.liveProjects() {
			todo.emptied = append(todo.emptied, p.state.Load().id)
		}
		for _, t := range ops.registry.liveTokens() {
			todo.tokens = append(todo.tokens, t.state.Load().id)
		}
	}
	if todo.projects { // first: it revokes tokens without reading them
		if err := ops.rereadProjects(ctx, todo.emptied); err != nil {
			return err
		}
	}
	for _, id := range todo.tokens {
		if err := ops.rereadToken(ctx, id); err != nil {
			return err
		}
	}
	if todo.prices {
		if err := ops.reloadPrices(ctx); err != nil {
			return err
		}
	}
	for _, p := range todo.purges {
		ops.purgeAgain(ctx, p)
	}
	return nil
}

// addUpdates adds what a change makes necessary. An action that this version does not have may change anything.
func (ops *operations) addUpdates(todo *pendingUpdates, c *auditChange) {
	kind, _, _ := strings.Cut(c.action, ".")
	purge := func(f cacheFilter) {
		if !c.own { // this process has purged before it answered; what it has stored since is newer
			todo.purges = append(todo.purges, purgedOf{c.object, f})
		}
	}
	switch {
	case c.action == "token.create", c.action == "project.create", c.action == "upstream.health",
		c.action == actionSignIn, c.action == actionSignInFailed, c.action == actionSignOut,
		c.action == actionExport, c.action == actionReveal, c.action == actionAuditBegin,
		kind == "key", kind == "webhook": // management keys, sessions and webhooks are read when they are needed
	case kind == "token":
		todo.tokens = append(todo.tokens, c.object)
	case c.action == "project.revoke_tokens", c.action == "project.delete":
		todo.projects = true
		todo.emptied = append(todo.emptied, c.object)
		purge(cacheFilter{token: anyToken})
	case kind == "project":
		todo.projects = true
	case kind == "upstream":
		if todo.projects = true; !c.own {
			ops.health.adoptReset(c.object, time.Now().UnixMilli())
		}
	case kind == "price":
		todo.prices = true
	case c.action == actionEmptyCache:
		purge(emptiedCache(c))
	case c.action == actionEraseContent, c.action == actionEraseEndUser:
		purge(cacheFilter{})
	case c.action == actionCutStream:
		if running := ops.running.find(parseRequestID(c.object)); running != nil {
			running.abort(errCutByAdmin)
		}
	default:
		todo.everything = true
	}
}

// emptiedCache returns which cached answers an event actionEmptyCache is about.
func emptiedCache(c *auditChange) (f cacheFilter) {
	var detail struct {
		Model     string `json:"model"`
		Endpoint  string `json:"endpoint"`
		OlderThan int64  `json:"older_than_seconds"`
	}
	if err := json.Unmarshal([]byte(c.detail), &detail); err != nil {
		return cacheFilter{} // all of them
	}
	f.model, f.endpoint = detail.Model, detail.Endpoint
	if detail.OlderThan != 0 {
		f.storedBefore = c.at - detail.OlderThan*1000
	}
	return f
}

// forgetUnknown forgets which hashes belong to no token: another replica may have created one. A row that is being read
// is read again.
func (g *registry) forgetUnknown() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.changes++
	clear(g.unknownHashes)
}

// rereadToken reads a live token again. One that cannot be read any more is revoked.
func (ops *operations) rereadToken(ctx context.Context, id string) error {
	if ops.registry.liveToken(id) == nil {
		return nil // its next call reads it
	}
	row, err := ops.store.boundTokenByID(ctx, id)
	if err != nil && !errors.Is(err, errNotFound) {
		return fmt.Errorf("reading a changed token: %w", err)
	}
	if err != nil || ops.registry.tokenChanged(&row) != nil {
		ops.registry.markRevoked(id)
	}
	return nil
}

// rereadProjects reads the live projects again whose version has changed, and those with the ids in emptied, whose
// tokens were revoked. One that cannot be read is inactive until it can be.
func (ops *operations) rereadProjects(ctx context.Context, emptied []string) error {
	live := ops.registry.liveProjects()
	seqs := make([]int64, len(live))
	for i, p := range live {
		seqs[i] = p.state.Load().seq
	}
	versions, err := ops.store.projectVersions(ctx, seqs)
	if err != nil {
		return err
	}
	for _, p := range live {
		st := p.state.Load()
		if version, known := versions[st.seq]; known && version == st.version && !st.loadFailed &&
			!slices.Contains(emptied, st.id) {
			continue
		}
		// After an error nothing outlives the change: see projectChanged.
		if err := ops.registry.projectChanged(ctx, st.seq); err != nil && isDatabaseAway(err) {
			return err
		}
	}
	return nil
}

// purgeAgain purges cached answers from this process's memory, and those from the disk that it has stored since.
func (ops *operations) purgeAgain(ctx context.Context, p purgedOf) {
	ctx, cancel := context.WithTimeout(ctx, purgeAgainTime)
	defer cancel()
	project, err := ops.store.projectByID(ctx, p.project)
	if err != nil {
		return // it is deleted, and so are its tokens
	}
	p.filter.project = project.seq
	_, _ = ops.cache.purge(ctx, p.filter) // memory is purged in any case, and the other replica purges the disk
}

// purgeAgainTime bounds how long other changes wait for a purge.
const purgeAgainTime = time.Second

// The questions that replicas ask each other.
const (
	askStreams = "streams" // the running calls
	askForget  = "forget"  // let running calls end without an end user, and write what has ended
)

// answer answers a question of another replica, as JSON.
func (ops *operations) answer(ctx context.Context, question, argument string) (string, error) {
	switch question {
	case askStreams:
		text, err := json.Marshal(ops.running.admittedCalls(time.Now()))
		return string(text), err
	case askForget:
		project, hash, _ := strings.Cut(argument, " ")
		return "{}", ops.forgetEndUser(ctx, project, func(name string) bool {
			hashed, err := ops.contentKey.hashEndUser(project, name)
			return name == hash || err == nil && hashed == hash
		})
	}
	return "", fmt.Errorf("an unknown question: %s", clip(question, 64))
}

// valueNames returns the names that a value of a limit with for_each may have in a project. That of an end user may be
// hashed, also where it is a session or a tag.
func (ops *operations) valueNames(ctx context.Context, project string, names []string) ([]string, error) {
	if len(names) == 0 {
		return nil, nil
	}
	p, err := ops.store.projectByID(ctx, project)
	if errors.Is(err, errNotFound) { // the project of a token that is left
		return names, nil
	}
	if err != nil {
		return nil, err
	}
	return ops.endUserNames(p, names[0])
}

// eraseEndUser removes an end user from all that is stored of a project's calls: the name from the calls, their pending
// records and their sums, their stored content, and the project's cached answers. It returns how many calls there were.
// The audit trail, from which nothing can be removed, does not get the name.
func (ops *operations) eraseEndUser(ctx context.Context, origin auditOrigin, projectID, name string,
) (erased int64, err error) {
	p, err := ops.store.projectByID(ctx, projectID)
	if err != nil {
		return 0, err
	}
	if name == "" || len(name) > maxAttributionLen {
		return 0, &fieldError{"end_user", fmt.Sprintf("must have 1 to %d bytes", maxAttributionLen)}
	}
	hash, err := ops.contentKey.hashEndUser(p.id, name)
	if err != nil {
		return 0, err
	}
	event := auditEvent{action: actionEraseEndUser, object: p.id}
	if err := ops.store.recordAuditEvent(ctx, origin, event); err != nil {
		return 0, fmt.Errorf("recording who erases an end user: %w", err)
	}
	names := []string{name, hash} // the policy may have changed
	isName := func(s string) bool { return slices.Contains(names, s) }
	forget := func() error {
		return errors.Join(ops.forgetEndUser(ctx, p.id, isName), ops.forgetEverywhere(ctx, p.id, hash))
	}
	if err := forget(); err != nil {
		return 0, err
	}
	if _, err := ops.cache.purge(ctx, cacheFilter{project: p.seq}); err != nil {
		return 0, err
	}
	for _, name := range names {
		n, err := ops.store.eraseEndUser(ctx, p.seq, name, forget)
		if err == nil {
			err = ops.limits.eraseValue(ctx, p.seq, endUserAttribute, name)
		}
		if erased += n; err != nil {
			return erased, err
		}
	}
	return erased, nil
}

const actionEraseEndUser = "end_user.erase"

// parseAttributionFilter reads the filters by attributes. A project that records end users by their hashes can be
// searched by their plain names.
func (ops *operations) parseAttributionFilter(ctx context.Context, project string, query url.Values,
) (attributionFilter, error) {
	f, err := newAttributionFilter(query.Get("session"), query.Get("end_user"), query.Get("tag"))
	if err != nil || f.endUser == "" || project == "" {
		return f, err
	}
	p, err := ops.store.projectByID(ctx, project)
	if errors.Is(err, errNotFound) {
		return f, nil // no call matches
	}
	if err != nil {
		return f, err
	}
	names, err := ops.endUserNames(p, f.endUser)
	f.endUser = names[len(names)-1]
	return f, err
}

// endUserNames returns the names that an end user may have in the ledger of a project: the plain one, and last, if the
// project's policy asks for that now, the hash. A name that has the form of a hash is one.
func (ops *operations) endUserNames(p projectRow, name string) ([]string, error) {
	names := []string{name}
	if isEndUserHash(name) {
		return names, nil
	}
	policy, err := parsePolicy([]byte(p.policy), true)
	if err != nil || policy.Attribution.recordsEndUsers() != endUsersHashed {
		return names, err
	}
	hash, err := ops.contentKey.hashEndUser(p.id, name)
	return append(names, hash), err
}

// auditName returns how the audit trail shows an end user or session that someone looked for in a project ("": in all):
// hashed, because nothing could erase the name from there.
func (ops *operations) auditName(project, name string) (string, error) {
	if isEndUserHash(name) {
		return name, nil
	}
	return ops.contentKey.hashEndUser(project, name)
}

// forgetEndUser lets the running calls of a project end without the end users that matches names, and returns when
// all that have ended are written, and all late usage of which the name was read before.
func (ops *operations) forgetEndUser(ctx context.Context, project string, matches func(name string) bool) error {
	for ops.running.forgetEndUser(project, matches) { // such a call queues its row within microseconds, and leaves
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
	ops.limits.awaitLateUse()
	written := ops.limits.ledger
	if err := written.awaitIfHealthy(ctx, written.queuedSoFar()); err != nil {
		return errLedgerUnavailable(err)
	}
	return nil
}

// forgetEndUser lets the running calls of a project end without an end user whose name matches. It reports whether one
// of them is ending, perhaps with the name.
func (rc *runningCalls) forgetEndUser(project string, matches func(name string) bool) (isEnding bool) {
	rc.mu.Lock()
	defer rc.mu.Unlock()
	for c := range rc.calls {
		info := c.info.Load()
		if info == nil || info.project.id != project ||
			!c.unnamed.Load() && !matches(info.attribution.value(endUserAttribute)) {
			continue
		}
		c.unnamed.Store(true)
		isEnding = isEnding || c.settling.Load()
		shown := *info
		shown.attribution = info.attribution.withEndUser("", nil)
		c.info.CompareAndSwap(info, &shown)
	}
	return isEnding
}

// eraseValue forgets what a value of an attribute has used of the limits of a project and its tokens. What calls use
// that run meanwhile is counted anew.
func (ls *limitState) eraseValue(ctx context.Context, project int64, attribute, value string) error {
	if err := ls.ledger.flush(ctx); err != nil {
		return fmt.Errorf("waiting for the ledger: %w", err)
	}
	rows, err := ls.store.limitValueRows(ctx, project, attribute, value)
	if err != nil {
		return err
	}
	p := ls.registry.liveProject(project)
	if p != nil {
		p.limiter.mu.Lock()
		defer p.limiter.mu.Unlock()
	}
	if ls.leases != nil {
		var accounts []string
		for _, r := range rows {
			owner := leaseOwner{project: project, token: r.token}
			for _, shadow := range [...]string{"", `"shadow":true,`} {
				rule := strings.Replace(r.rule, `"count"`, shadow+`"count"`, 1)
				accounts = append(accounts, accountName(owner, rule, value))
			}
		}
		// The values before the accounts: a replica that makes an account again reads what the values have.
		if err := ls.store.deleteLimitValues(ctx, project, value, rows); err != nil {
			return err
		}
		if err := ls.store.backend.leases.deleteAccounts(ctx, accounts); err != nil {
			return err
		}
	}
	if p != nil {
		p.limiter.forget(attribute, value)
		if err := ls.ledger.awaitIfHealthy(ctx, ls.ledger.queuedSoFar()); err != nil { // calls have ended meanwhile
			return fmt.Errorf("waiting for the ledger: %w", err)
		}
	}
	return ls.store.deleteLimitValues(ctx, project, value, rows)
}

// askOthers asks the other replicas a question. It returns their answers, and the ids of those that did not answer.
func (ops *operations) askOthers(ctx context.Context, question, argument string, wait time.Duration) (
	answers []string, silent []int64, err error) {
	if ops.store.backend == nil {
		return nil, nil, nil
	}
	return ops.store.backend.ask(ctx, question, argument, wait)
}

// forgetEverywhere is forgetEndUser at the other replicas. The name of the end user does not leave this one.
func (ops *operations) forgetEverywhere(ctx context.Context, project, hash string) error {
	_, silent, err := ops.askOthers(ctx, askForget, project+" "+hash, forgetTime)
	if err == nil && len(silent) > 0 {
		err = errLedgerUnavailable(fmt.Errorf("replicas that did not answer: %v", silent))
	}
	return err
}

const (
	streamsTime = time.Second     // for the answers of other replicas about running calls
	forgetTime  = 5 * time.Second // for them to write the calls that have ended
)

// A streamList is a page of the running calls of all replicas. SilentReplicas did not say which they have.
type streamList struct {
	listPage[streamView]
	SilentReplicas []int64 `json:"silent_replicas"`
}

// allStreams returns the running calls of all replicas, oldest first.
func (ops *operations) allStreams(ctx context.Context, now time.Time) (calls []streamView, silent []int64, err error) {
	calls = ops.running.admittedCalls(now)
	answers, silent, err := ops.askOthers(ctx, askStreams, "", streamsTime)
	if err != nil {
		return nil, nil, err
	}
	for _, answer := range answers {
		var more []streamView
		if err := json.Unmarshal([]byte(answer), &more); err != nil {
			return nil, nil, fmt.Errorf("reading the running calls of another replica: %w", err)
		}
		for i := range more {
			more[i].seq = parseRequestID(more[i].ID)
		}
		calls = append(calls, more...)
	}
	slices.SortFunc(calls, func(a, b streamView) int { return cmp.Compare(a.seq, b.seq) })
	return calls, silent, nil
}

// listStreams returns a page of the running calls of all replicas, oldest first.
func (ops *operations) listStreams(ctx context.Context, f streamFilter, now time.Time) (*streamList, error) {
	calls, silent, err := ops.allStreams(ctx, now)
	if err != nil {
		return nil, err
	}
	calls = slices.DeleteFunc(calls, func(v streamView) bool {
		return v.seq <= f.afterSeq || f.project != "" && v.ProjectID != f.project ||
			f.token != "" && v.TokenID != f.token || !f.matches(&attribution{v.Session, v.EndUser, v.Tags})
	})
	return &streamList{newListPage(calls, f.limit,
		func(v *streamView) streamView { return *v },
		func(v *streamView) string { return formatCursor(v.seq, "") }), append([]int64{}, silent...)}, nil
}

// findStream returns a running call of any replica, or errNotFound.
func (ops *operations) findStream(ctx context.Context, id string, now time.Time) (*streamView, error) {
	seq := parseRequestID(id)
	if seq == 0 {
		return nil, errNotFound
	}
	calls, silent, err := ops.running.admittedCalls(now), []int64(nil), error(nil)
	if ops.running.find(seq) == nil {
		calls, silent, err = ops.allStreams(ctx, now)
	}
	if err != nil {
		return nil, err
	}
	for i := range calls {
		if calls[i].seq == seq {
			return &calls[i], nil
		}
	}
	if len(silent) > 0 {
		return nil, errStoreUnavailable(fmt.Errorf("replicas that did not answer: %v", silent))
	}
	return nil, errNotFound
}

const actionCutStream = "stream.cut"

// abortStream ends a running call. Its client's response is cut off, and its row says why.
func (ops *operations) abortStream(ctx context.Context, origin auditOrigin, id string) error {
	v, err := ops.findStream(ctx, id, time.UnixMilli(origin.at))
	if err != nil {
		return err
	}
	err = ops.store.recordAuditEvent(ctx, origin, auditEvent{action: actionCutStream, object: v.ID,
		detail: []auditField{{"project_id", v.ProjectID}, {"token_id", v.TokenID}}})
	if err != nil {
		return err // nothing is done that is not on the trail
	}
	if c := ops.running.find(v.seq); c != nil { // another replica reads the trail
		c.abort(errCutByAdmin)
	}
	return nil
}

// A replicaView is a replica in an answer of /manage. Ages and offsets are milliseconds.
type replicaView struct {
	ID           int64     `json:"id"`
	Slot         int64     `json:"slot"`
	Address      string    `json:"address"`
	Version      string    `json:"version"`
	StartedAt    timestamp `json:"started_at"`
	State        string    `json:"state"` // serving, silent (no heartbeat for a while) or closed (its calls are lost)
	Self         bool      `json:"self"`  // it answers this request
	Leader       bool      `json:"leader"`
	HeartbeatMS  int64     `json:"heartbeat_age_ms"`
	RunningCalls int64     `json:"running_calls"`
	Leases       int64     `json:"limit_leases"`
	LagMS        int64     `json:"changes_lag_ms"`
	OffsetMS     int64     `json:"clock_offset_ms"`
}

const silentAfterMS = 3000 // a heartbeat is sent every second

// listReplicas returns all replicas that serve, and those whose calls are still to be recorded. With SQLite there is
// one process.
func (ops *operations) listReplicas(ctx context.Context) ([]replicaView, error) {
	if ops.store.backend == nil {
		self := &ops.self
		return []replicaView{{ID: 1, Address: self.address, Version: self.version, Self: true, Leader: true,
			StartedAt: timestamp(self.startedAt), State: "serving", RunningCalls: ops.running.count()}}, nil
	}
	rows, err := ops.store.backend.listReplicas(ctx)
	views := []replicaView{}
	for i := range rows {
		r := &rows[i]
		var info replicaInfo
		if err := json.Unmarshal([]byte(r.info), &info); err != nil {
			info = replicaInfo{} // of a version that says it in another form
		}
		v := replicaView{ID: r.id, Slot: r.slot, Address: r.address, Version: r.version, State: "serving",
			StartedAt: timestamp(r.startedAt), Self: r.id == ops.store.backend.replica, Leader: info.Leader,
			HeartbeatMS: max(0, r.now-r.beatAt), RunningCalls: info.Calls, Leases: info.Leases, LagMS: info.LagMS,
			OffsetMS: info.OffsetMS}
		switch {
		case r.closedAt != nil:
			v.State, v.Leader = "closed", false
		case v.HeartbeatMS > silentAfterMS:
			v.State, v.Leader = "silent", false
		}
		views = append(views, v)
	}
	return views, err
}

func (api *manageAPI) listReplicas(r *manageRequest) (any, error) {
	views, err := api.ops.listReplicas(r.ctx)
	return listPage[replicaView]{Data: views}, err
}
