// This file decides what the rows of a backup may still grant when it is restored with --revoke=since: no more
// than in the backup, and no more than in the current database. So what was narrowed since the backup stays
// narrow, and what was widened since is not carried over. Plain code: it changes rows in memory only.
package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// A restoreImpact counts what a backup would grant again, by the kind of difference.
type restoreImpact struct {
	restoreCount
	revoked, rotated, expiryShortened               int64 // tokens
	idleShortened, requestsLowered, tokenPolicies   int64 // tokens
	managementKeys                                  int64
	deactivated, projectPolicies                    int64 // projects
	upstreamsEnded, upstreamKeys, upstreamsNarrowed int64 // upstreams
	widened                                         int64 // rows that grant more now than they will
}

// addToken narrows a token and counts how.
func (n *narrowing) addToken(impact *restoreImpact, p *restorePair[tokenRow]) error {
	t, c := p.backup, &p.current
	switch {
	case c.revokedAt != nil:
		t.revokedAt = c.revokedAt
		impact.revoked++
	case !bytes.Equal(t.hash, c.hash): // the new value is unknown to the backup; the old one may have leaked
		t.revokedAt = &n.at
		impact.rotated++
	default:
		if !bytes.Equal(t.oldHash, c.oldHash) {
			t.oldHash, t.oldHashUntil = nil, nil
		}
		t.oldHashUntil, _ = lower(t.oldHashUntil, c.oldHashUntil)
		var shorter, sooner, fewer, narrower bool
		t.expiresAt, shorter = lower(t.expiresAt, c.expiresAt)
		t.idleExpiry, sooner = lower(t.idleExpiry, c.idleExpiry)
		t.maxRequests, fewer = lower(t.maxRequests, c.maxRequests)
		policy, widened, err := narrowPolicy(t.policy, c.policy, false)
		if err != nil {
			return fmt.Errorf("the policy of token %s: %w", t.id, err)
		}
		narrower, t.policy = policy != t.policy, policy
		impact.expiryShortened += oneIf(shorter)
		impact.idleShortened += oneIf(sooner)
		impact.requestsLowered += oneIf(fewer)
		impact.tokenPolicies += oneIf(narrower)
		impact.widened += oneIf(widened || isLower(t.expiresAt, c.expiresAt) ||
			isLower(t.idleExpiry, c.idleExpiry) || isLower(t.maxRequests, c.maxRequests))
		if !shorter && !sooner && !fewer && !narrower {
			return nil
		}
	}
	n.tokens = append(n.tokens, t)
	return nil
}

// addManagementKey narrows a management key and counts how.
func (n *narrowing) addManagementKey(impact *restoreImpact, p *restorePair[managementKeyRow]) {
	k, c := p.backup, &p.current
	var shorter bool
	k.expiresAt, shorter = lower(k.expiresAt, c.expiresAt)
	lowered := role(c.role).rank() < role(k.role).rank()
	if lowered {
		k.role = c.role
	}
	k.revokedAt = c.revokedAt
	impact.widened += oneIf(c.revokedAt == nil && (c.role != k.role || isLower(k.expiresAt, c.expiresAt)))
	if shorter || lowered || k.revokedAt != nil {
		impact.managementKeys++
		n.keys = append(n.keys, k)
	}
}

// addProject narrows a project and counts how. One that is deleted now is deleted again: its tokens are revoked
// and its provider keys wiped in the current database, so addToken and addUpstream do the same.
func (n *narrowing) addProject(impact *restoreImpact, p *restorePair[projectRow]) error {
	row, c := p.backup, &p.current
	ended := c.deletedAt != nil || row.active && !c.active
	row.active, row.deletedAt = row.active && c.active && c.deletedAt == nil, c.deletedAt
	if row.deletedAt != nil {
		row.name += " (deleted " + row.id + ")"
	}
	policy, widened, err := narrowPolicy(row.policy, c.policy, true)
	if err != nil {
		return fmt.Errorf("the policy of project %s: %w", row.id, err)
	}
	narrower := policy != row.policy
	row.policy = policy
	impact.deactivated += oneIf(ended)
	impact.projectPolicies += oneIf(narrower && !ended)
	impact.widened += oneIf(widened || c.active && !row.active)
	if ended || narrower {
		n.projects = append(n.projects, row)
	}
	return nil
}

// addUpstream narrows an upstream and counts how.
func (n *narrowing) addUpstream(impact *restoreImpact, p *restorePair[upstreamRow]) error {
	u, c := p.backup, &p.current
	rotated := u.takeNewKey(c)
	ended := c.deletedAt != nil || u.active && !c.active
	u.active, u.deletedAt = u.active && c.active, c.deletedAt
	if u.deletedAt != nil {
		u.active, u.sealedKey, u.keyHint = false, []byte{}, ""
	}
	narrower, err := u.narrowUse(c)
	if err != nil {
		return fmt.Errorf("upstream %s: %w", u.id, err)
	}
	impact.upstreamsEnded += oneIf(ended)
	impact.upstreamKeys += oneIf(rotated && !ended)
	impact.upstreamsNarrowed += oneIf(narrower && !ended)
	if ended || rotated || narrower {
		n.upstreams = append(n.upstreams, u)
	}
	return nil
}

// takeNewKey replaces a provider key that was changed since, because the old one may have leaked. If all keys were
// encrypted with another encryption key since, the new one cannot be read with the backup's: an upstream whose key
// has another hint becomes inactive then.
func (u *upstreamRow) takeNewKey(c *upstreamRow) (rotated bool) {
	if bytes.Equal(u.sealedKey, c.sealedKey) || len(c.sealedKey) == 0 {
		return false
	}
	if keyID(u.sealedKey) == keyID(c.sealedKey) {
		u.sealedKey, u.keyHint, u.baseURL = c.sealedKey, c.keyHint, c.baseURL // sealed for the URL's host
		u.organization, u.openaiProject = c.organization, c.openaiProject
		return true
	}
	rotated = u.keyHint != c.keyHint
	u.active = u.active && !rotated
	return rotated
}

// narrowUse narrows with whom an upstream is shared, for which models it is used, and its limits.
func (u *upstreamRow) narrowUse(c *upstreamRow) (narrower bool, err error) {
	var shared, sharedNow, models, modelsNow []string
	var settings, settingsNow upstreamSettings
	for _, f := range []struct {
		text   string
		target any
	}{{u.sharedWith, &shared}, {c.sharedWith, &sharedNow}, {u.models, &models}, {c.models, &modelsNow},
		{u.settings, &settings}, {c.settings, &settingsNow}} {
		if err := json.Unmarshal([]byte(f.text), f.target); err != nil {
			return false, err
		}
	}
	if n := len(shared); n > 0 {
		shared = slices.DeleteFunc(shared, func(id string) bool { return !slices.Contains(sharedNow, id) })
		narrower = len(shared) < n
	}
	if len(modelsNow) > 0 { // an empty list means all models
		both := modelsNow
		if len(models) > 0 {
			both = intersectLists(models, modelsNow, intersectPatterns)
		}
		narrower = narrower || !slices.Equal(both, models)
		if models = both; len(both) == 0 {
			u.active = false
		}
	}
	for _, l := range []struct{ limit, now *int64 }{
		{&settings.RequestsPerMinute, &settingsNow.RequestsPerMinute},
		{&settings.TokensPerMinute, &settingsNow.TokensPerMinute},
	} {
		if *l.now > 0 && (*l.limit == 0 || *l.now < *l.limit) {
			*l.limit, narrower = *l.now, true
		}
	}
	if narrower {
		u.sharedWith, u.models = string(auditValueJSON(append([]string{}, shared...))), string(auditValueJSON(models))
		u.settings = settings.String()
	}
	return narrower, nil
}

// oneIf returns 1 or 0.
func oneIf(yes bool) int64 {
	if yes {
		return 1
	}
	return 0
}

// isLower reports whether a is below b. nil is no limit.
func isLower(a, b *int64) bool { return a != nil && (b == nil || *a < *b) }

// lower returns the lower of two limits, and whether that is b because it is below a.
func lower(a, b *int64) (*int64, bool) {
	if isLower(b, a) {
		return b, true
	}
	return a, false
}

// narrowPolicy returns the text of a policy that allows what both policies allow: the backup's text if that is
// the same as in the backup. widened reports whether the current policy allows more than the result.
func narrowPolicy(backup, current string, ofProject bool) (text string, widened bool, err error) {
	if backup == current {
		return backup, false, nil
	}
	b, err := parsePolicy([]byte(backup), ofProject)
	if err != nil {
		return "", false, err
	}
	c, err := parsePolicy([]byte(current), ofProject)
	if err != nil {
		return "", false, err
	}
	both := b.intersect(&c)
	widened = both.String() != c.String()
	if both.String() == b.String() {
		return backup, widened, nil
	}
	return both.String(), widened, nil
}

// intersect returns a policy that allows what both p and now allow. Where that would have more entries than a
// policy may, it has now's.
func (p *policy) intersect(now *policy) policy {
	return policy{
		Endpoints:       intersectLists(p.Endpoints, now.Endpoints, intersectEndpoints),
		Models:          intersectLists(p.Models, now.Models, intersectPatterns),
		Addresses:       intersectLists(p.Addresses, now.Addresses, intersectNetworks),
		Limits:          lowerLimits(p.Limits, now.Limits),
		Stateful:        p.Stateful && now.Stateful,
		KeepContentDays: min(p.KeepContentDays, now.KeepContentDays),
		Cache:           p.Cache.narrowed(now.Cache),
		Attribution:     p.Attribution.narrowed(now.Attribution),
	}
}

// intersectLists returns what both lists allow; a nil list allows everything. both returns what an entry of each
// list allow together, and false if that is nothing.
func intersectLists[T comparable](backup, now []T, both func(a, b T) (T, bool)) []T {
	if backup == nil || now == nil || slices.Equal(backup, now) {
		if backup == nil {
			return now
		}
		return backup
	}
	out := []T{}
	for _, a := range backup {
		for _, b := range now {
			if e, ok := both(a, b); ok && !slices.Contains(out, e) {
				out = append(out, e)
			}
		}
	}
	if len(out) > maxPolicyEntries {
		return now
	}
	return out
}

// intersectPatterns returns the pattern of what two patterns both match: the longer one, if the other matches it.
func intersectPatterns(a, b string) (string, bool) {
	if matchesPattern(a, b) {
		return b, true
	}
	return a, matchesPattern(b, a)
}

// intersectEndpoints is intersectPatterns for endpoints, each with or without a method.
func intersectEndpoints(a, b string) (string, bool) {
	methodA, pathA := splitEndpoint(a)
	methodB, pathB := splitEndpoint(b)
	path, ok := intersectPatterns(pathA, pathB)
	switch {
	case !ok || methodA != "" && methodB != "" && methodA != methodB:
		return "", false
	case methodA == "":
		methodA = methodB
	}
	return strings.TrimPrefix(methodA+" "+path, " "), true
}

func splitEndpoint(entry string) (method, path string) {
	if method, path, ok := strings.Cut(entry, " "); ok {
		return method, path
	}
	return "", entry
}

func intersectNetworks(a, b netip.Prefix) (netip.Prefix, bool) {
	if a.Bits() > b.Bits() {
		return a, a.Overlaps(b)
	}
	return b, a.Overlaps(b)
}

// lowerLimits returns the limits of both lists. Of two that count the same calls, it has the lower.
func lowerLimits(backup, now []limit) []limit {
	out := slices.Clone(backup)
	for _, l := range now {
		i := slices.IndexFunc(out, func(o limit) bool { return o.key() == l.key() })
		if i < 0 {
			out = append(out, l)
		} else {
			out[i].max, out[i].maxValues = min(out[i].max, l.max), min(out[i].maxValues, l.maxValues)
		}
	}
	if len(out) > maxLimits {
		return now
	}
	return out
}

// auditFields are what the audit trail records of a narrowing: how many rows of each kind changed.
func (n *narrowing) auditFields() []auditField {
	all := []auditField{{"tokens", len(n.tokens)}, {"management_keys", len(n.keys)}, {"projects", len(n.projects)},
		{"upstreams", len(n.upstreams)}}
	return slices.DeleteFunc(all, func(f auditField) bool { return f.value == 0 })
}
