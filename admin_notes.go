// What the dashboard says needs attention: tokens about to expire, limits nearly
// spent, provider keys that are not well, and trouble of this program's own.
package main

import (
	"errors"
	"net/url"
	"time"
)

// stamps writes a time as the dashboard's texts have it.
func stamps(ms int64) string { return time.UnixMilli(ms).UTC().Format("2 Jan 2006 15:04") }

// dashNotes lists what needs attention, the worst first.
func (s *server) dashNotes(r *pageRequest, q *dashQuery, d *dashData) ([]dashNote, error) {
	notes := s.ownTrouble(r)
	for _, k := range d.keys {
		if q.projectID == "" || k.projectID == q.projectID {
			notes = append(notes, dashNote{Level: "bad", Kind: "Provider key", Text: keyNote(&k, r.now), Link: "/admin/projects/" + k.projectID})
		}
	}
	resting, err := s.restingLimits(r, q, d)
	if err != nil {
		return nil, err
	}
	near := append(s.registry.nearLimits(q.now, spentPart, limitsLooked), resting...)
	fullest(near)
	left := notesShown
	for _, n := range near {
		if q.projectID != "" && n.projectID != q.projectID {
			continue
		}
		if left--; left < 0 {
			break
		}
		note := dashNote{Level: "warn", Kind: "Limit", Link: "/admin/projects/" + n.projectID,
			Text: percent(100*n.part) + " of " + n.limit + " is used: project " + n.project}
		if n.token != "" {
			note.Link, note.Text = "/admin/tokens/"+url.PathEscape(n.token), note.Text+", token "+n.name
		}
		if n.part >= 1 {
			note.Level = "bad"
		}
		notes = append(notes, note)
	}
	return append(notes, expiryNotes(r, q, d)...), nil
}

// restingLimits returns the nearly spent limits of projects and tokens that are
// not live: of the largest in the period, for each takes some reading.
func (s *server) restingLimits(r *pageRequest, q *dashQuery, d *dashData) (out []nearLimit, err error) {
	projects := d.projects[:min(len(d.projects), restingLooked)]
	if q.project != 0 {
		projects = []share{{seq: q.project, id: q.projectID}}
	}
	for _, of := range projects {
		if s.registry.liveProject(of.seq) != nil {
			continue
		}
		p, err := s.store.projectByID(r.ctx, of.id)
		if errors.Is(err, errNotFound) { // deleted
			continue
		}
		if err != nil {
			return nil, err
		}
		counters, err := s.storedCounters(r.ctx, p.policy, true, p.seq, 0, q.now)
		if err != nil {
			return nil, err
		}
		out = append(out, nearOf(counters, q.now, spentPart, nearLimit{project: p.name, projectID: p.id})...)
	}
	for _, v := range d.tokens[:min(len(d.tokens), restingLooked)] {
		if s.registry.liveToken(v.id) != nil {
			continue
		}
		t, err := s.store.tokenByID(r.ctx, v.id)
		if err != nil {
			return nil, err
		}
		if t.revokedAt != nil || t.expiresAt != nil && *t.expiresAt <= q.now {
			continue
		}
		counters, err := s.storedCounters(r.ctx, t.policy, false, t.project, t.seq, q.now)
		if err != nil {
			return nil, err
		}
		out = append(out, nearOf(counters, q.now, spentPart, nearLimit{token: t.id, name: t.name, project: v.label, projectID: t.projectID})...)
	}
	return out, nil
}

// ownTrouble is what keeps this program from taking or recording calls, or soon
// will.
func (s *server) ownTrouble(r *pageRequest) (notes []dashNote) {
	if why := s.gone(); why != "" {
		notes = append(notes, dashNote{Level: "bad", Kind: "Database", Text: "The database file is gone (" + why + "). Calls are refused. Stop the program and look into it with llm-proxy doctor."})
	}
	if !s.ledger.healthy() {
		notes = append(notes, dashNote{Level: "bad", Kind: "Ledger", Text: "The ledger cannot be written, so calls are refused. Is the disk full?"})
	}
	if s.diskUse == nil {
		return notes
	}
	if use, err := s.diskUse(r.ctx); err == nil && use.left < diskLow {
		notes = append(notes, dashNote{Level: "bad", Kind: "Disk", Text: showBytes(use.left) + " are left on the database's disk, which holds " + showBytes(use.file) + " of it."})
	}
	return notes
}

func keyNote(k *keyTrouble, now time.Time) string {
	text := k.project + ", " + k.upstream + ": "
	switch k.state {
	case "quarantined":
		text += "the provider does not take this key"
	case "exhausted":
		text += "the account has no money or quota left"
	case "cooling":
		text += "the provider says that it gets too many calls"
	default:
		text += "its calls fail"
	}
	if k.reason != "" {
		text += " (" + k.reason + ")"
	}
	text += ", noticed " + relative(time.UnixMilli(k.since).Sub(now)) + "."
	return text
}

// expiryNotes names the tokens that expire within a week.
func expiryNotes(r *pageRequest, q *dashQuery, d *dashData) (notes []dashNote) {
	others := int64(0)
	for _, t := range d.expiring {
		switch {
		case q.projectID != "" && t.projectID != q.projectID:
		case len(notes) < notesShown:
			notes = append(notes, dashNote{Level: "warn", Kind: "Token", Link: "/admin/tokens/" + url.PathEscape(t.id),
				Text: t.name + " of " + t.project + " expires " + relative(time.UnixMilli(t.at).Sub(r.now)) + "."})
		default:
			others++
		}
	}
	if others > 0 {
		text := plural(others, "more token expires", "more tokens expire") + " within a week."
		if len(d.expiring) == expiringMost {
			text = "At least " + text
		}
		notes = append(notes, dashNote{Level: "warn", Kind: "Token", Text: text, Link: "/admin/tokens"})
	}
	return notes
}
