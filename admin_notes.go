// What the dashboard says needs attention: tokens about to expire, limits nearly
// spent, provider keys that are not well, and trouble of this program's own.
package main

import (
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
	left := notesShown
	for _, n := range s.registry.nearLimits(q.now, spentPart, limitsLooked) {
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
